// node browser.mjs TASKS: as node.mjs, but in a headless Chromium by WebAssembly. Everything comes from a server on this
// machine; a request to any other address is refused and ends the script. CHROMIUM names the browser, by default
// /usr/bin/chromium.
import { createReadStream, existsSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { basename, dirname, extname, join, normalize, resolve, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

const here = dirname(fileURLToPath(import.meta.url));
const tasks = JSON.parse(process.argv[2]);
const TYPES = { '.html': 'text/html', '.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm',
  '.json': 'application/json', '.png': 'image/png', '.jpg': 'image/jpeg' };
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];

/** Where the paths of the server lie; the folder and the image of a task have its number. */
const roots = { client: here, node_modules: join(here, 'node_modules') };
const asked = tasks.map((task, number) => {
  roots[`folders/${number}`] = resolve(task.folder);
  if (!task.image) return { ...task, folder: `${number}` };
  roots[`images/${number}`] = resolve(dirname(task.image));
  return { ...task, folder: `${number}`, image: `/images/${number}/${basename(task.image)}` };
});

/** The file that a path of the server means, or null. */
function fileOf(path) {
  for (const [prefix, root] of Object.entries(roots)) {
    if (!path.startsWith(`/${prefix}/`)) continue;
    const file = normalize(join(root, path.slice(prefix.length + 2)));
    return file.startsWith(root + sep) && existsSync(file) && statSync(file).isFile() ? file : null;
  }
  return null;
}

const server = createServer((request, response) => {
  const file = fileOf(decodeURIComponent(new URL(request.url, 'http://localhost').pathname));
  if (!file) {
    response.writeHead(404).end();
    return;
  }
  const type = TYPES[extname(file)] ?? 'application/octet-stream';
  // Isolation lets the page use threads.
  response.writeHead(200, { 'Content-Type': type, 'Content-Length': statSync(file).size,
    'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' });
  createReadStream(file).pipe(response);
});
await new Promise((done) => server.listen(0, '127.0.0.1', done));
const address = `http://127.0.0.1:${server.address().port}`;
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS });
try {
  const page = await browser.newPage();
  const outside = [];
  await page.route((url) => url.origin !== address && !['blob:', 'data:'].includes(url.protocol), async (route) => {
    outside.push(route.request().url());
    await route.abort();
  });
  page.on('pageerror', (error) => console.error(error));
  page.on('console', (message) => console.error(message.text()));
  await page.goto(`${address}/client/page.html`);
  await page.waitForFunction('window.work');
  const found = [];
  for (const task of asked) found.push(await page.evaluate((given) => window.work(given), task));
  if (outside.length) throw new Error(`the page asked for ${outside.join(', ')}`);
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
  server.close();
}
