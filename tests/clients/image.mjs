// node image.mjs FOLDER IMAGE MESSAGES COUNT: answer a question about an image; MESSAGES is JSON. Prints JSON.
// Without MESSAGES and COUNT, prints the pixel values alone.
import * as library from '@huggingface/transformers';
import { answerImage, preparePixels } from './common.mjs';

const [folder, picture, messages, count] = process.argv.slice(2);
library.env.allowRemoteModels = false;
const found = messages
  ? await answerImage(library, folder, picture, JSON.parse(messages), Number(count))
  : await preparePixels(library, folder, picture);
console.log(JSON.stringify(found));
