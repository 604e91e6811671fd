// node text.mjs FOLDER MESSAGES COUNT: answer a chat with text alone; MESSAGES is JSON. Prints JSON.
import * as library from '@huggingface/transformers';
import { answerText } from './common.mjs';

const [folder, messages, count] = process.argv.slice(2);
library.env.allowRemoteModels = false;
console.log(JSON.stringify(await answerText(library, folder, JSON.parse(messages), Number(count))));
