// What the clients in Node and in the browser do alike, once transformers.js is there. A task is one of
//   {folder, messages, count}         answer a chat
//   {folder, messages, count, image}  answer a chat about an image
//   {folder, image}                   prepare an image
//   {folder, conversations}           give the ids of prompts, an image being one id

/** The ids of a tensor of one row as numbers. */
const numbers = (tensor) => Array.from(tensor.data, Number);

/** Do a task; `options` are those of loading a model. */
export async function work(library, task, options = {}) {
  if (task.conversations) return await promptIds(library, task);
  if (!task.messages) return await preparedPixels(library, task);
  const { AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText } = library;
  const config = await AutoConfig.from_pretrained(task.folder);
  const Model = config.model_type === 'llava' ? AutoModelForImageTextToText : AutoModelForCausalLM;
  const model = await Model.from_pretrained(task.folder, options);
  const [tokenizer, inputs] = await (task.image ? imageInputs : textInputs)(library, task);
  const all = await model.generate({ ...inputs, max_new_tokens: task.count, do_sample: false });
  const input_ids = numbers(inputs.input_ids);
  const generated_ids = numbers(all).slice(input_ids.length);
  return { input_ids, generated_ids, text: tokenizer.decode(generated_ids, { skip_special_tokens: true }) };
}

async function textInputs(library, { folder, messages }) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(folder);
  return [tokenizer, tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })];
}

async function imageInputs(library, { folder, messages, image }) {
  const processor = await library.AutoProcessor.from_pretrained(folder);
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
  return [processor.tokenizer, await processor(await library.RawImage.read(image), prompt)];
}

async function preparedPixels(library, { folder, image }) {
  const processor = await library.AutoProcessor.from_pretrained(folder);
  const { pixel_values } = await processor.image_processor(await library.RawImage.read(image));
  return { dims: pixel_values.dims, values: Array.from(pixel_values.data) };
}

async function promptIds(library, { folder, conversations }) {
  const tokenizer = await library.AutoTokenizer.from_pretrained(folder);
  const options = { add_generation_prompt: true, return_tensor: false, return_dict: false };
  return conversations.map((messages) => tokenizer.apply_chat_template(messages, options));
}
