// node node.mjs TASKS: do tasks in Node; TASKS is JSON, a list of what common.mjs describes. Prints a list of results.
import * as library from '@huggingface/transformers';
import { work } from './common.mjs';

library.env.allowRemoteModels = false;
const found = [];
for (const task of JSON.parse(process.argv[2])) found.push(await work(library, task));
console.log(JSON.stringify(found));
