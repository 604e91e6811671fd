// What the clients in Node and in the browser do alike, once transformers.js is there.

/** The ids of a tensor of one row as numbers. */
const numbers = (tensor) => Array.from(tensor.data, Number);

/** Generate greedily behind `inputs` and return ids of the prompt, ids of the answer and its text. */
async function answer(model, tokenizer, inputs, count) {
  const all = await model.generate({ ...inputs, max_new_tokens: count, do_sample: false });
  const input_ids = numbers(inputs.input_ids);
  const generated_ids = numbers(all).slice(input_ids.length);
  const text = tokenizer.decode(generated_ids, { skip_special_tokens: true });
  return { input_ids, generated_ids, text };
}

/** Answer a chat with text alone. */
export async function answerText(library, folder, messages, count, options = {}) {
  const { AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer } = library;
  const config = await AutoConfig.from_pretrained(folder);
  const Model = config.model_type === 'llava' ? AutoModelForImageTextToText : AutoModelForCausalLM;
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  const model = await Model.from_pretrained(folder, options);
  const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
  return await answer(model, tokenizer, inputs, count);
}

/** Answer a question about an image; pixel values come back too, to be compared with those of training. */
export async function answerImage(library, folder, picture, messages, count, options = {}) {
  const { AutoModelForImageTextToText, AutoProcessor, RawImage } = library;
  const processor = await AutoProcessor.from_pretrained(folder);
  const model = await AutoModelForImageTextToText.from_pretrained(folder, options);
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
  const inputs = await processor(await RawImage.read(picture), prompt);
  const found = await answer(model, processor.tokenizer, inputs, count);
  return { ...found, prompt, pixel_dims: inputs.pixel_values.dims, pixel_values: Array.from(inputs.pixel_values.data) };
}

/** The pixel values alone. */
export async function preparePixels(library, folder, picture) {
  const processor = await library.AutoProcessor.from_pretrained(folder);
  const { pixel_values } = await processor.image_processor(await library.RawImage.read(picture));
  return { pixel_dims: pixel_values.dims, pixel_values: Array.from(pixel_values.data) };
}
