// node browser.mjs FOLDER TASKS [IMAGE]: as text.mjs and image.mjs, but in a headless Chromium by WebAssembly.
// TASKS is JSON: [{messages, count, image}, ...]; with image true, IMAGE is asked about, and without messages its pixel
// values come back. Prints JSON, one answer for each task. Everything comes from a server on this machine; a request to
// any other address is refused and ends the script. CHROMIUM names the browser, by default /usr/bin/chromium.
import { createReadStream, existsSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { dirname, extname, join, normalize, resolve, sep } from 'node:path';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';

const here = dirname(fileURLToPath(import.meta.url));
const [folder, tasks, image] = process.argv.slice(2);
const TYPES = { '.html': 'text/html', '.mjs': 'text/javascript', '.js': 'text/javascript', '.wasm': 'application/wasm',
  '.json': 'application/json', '.png': 'image/png', '.jpg': 'image/jpeg' };
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];

/** The file that a path of the server means, or null. */
function fileOf(path) {
  if (path === '/image') return image ? resolve(image) : null;
  const roots = { client: here, node_modules: join(here, 'node_modules'), 'models/exported': resolve(folder) };
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
  await page.waitForFunction('window.ready');
  const found = [];
  for (const task of JSON.parse(tasks)) found.push(await page.evaluate((given) => window.answer(given), task));
  if (outside.length) throw new Error(`the page asked for ${outside.join(', ')}`);
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
  server.close();
}
