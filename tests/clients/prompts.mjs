// node prompts.mjs TASKS: the ids of prompts, an image being one id. TASKS is JSON: [{folder, conversations}, ...].
// Prints JSON: for each folder, for each conversation, the ids.
import { AutoTokenizer, env } from '@huggingface/transformers';

env.allowRemoteModels = false;
const options = { add_generation_prompt: true, return_tensor: false, return_dict: false };
const found = [];
for (const { folder, conversations } of JSON.parse(process.argv[2])) {
  const tokenizer = await AutoTokenizer.from_pretrained(folder);
  found.push(conversations.map((messages) => tokenizer.apply_chat_template(messages, options)));
}
console.log(JSON.stringify(found));
