/**
 * Headless Chromium with WebGPU, and a Vite server for the sources under test. On x86-64 Linux the browser
 * comes from the npm package `@sparticuz/chromium` and needs nothing else from the machine; elsewhere an
 * installed Chrome is used.
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { brotliDecompressSync } from "node:zlib";
import { chromium } from "playwright-core";
import { createServer, defaultClientConditions } from "vite";
import { packagedArchives, unpackOnce, untar } from "../../src/gpu/fallback.node.ts";
import { define } from "../../vite.config.ts";
import type { Browser, Page } from "playwright-core";
import type { ViteDevServer } from "vite";

const ROOT = fileURLToPath(new URL("../../", import.meta.url));
const FLAGS = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
const FONTS = `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">fonts</dir><cachedir prefix="relative">fonts-cache</cachedir></fontconfig>
`;

/** Starts the browser. The caller closes it. */
export async function launchChromium(): Promise<Browser> {
  const archives = packagedArchives();
  if (archives === null) return chromium.launch({ channel: "chrome", args: FLAGS });
  const folder = unpackOnce("chromium", archives.version, (into) => {
    const read = (name: string) => brotliDecompressSync(readFileSync(join(archives.folder, name)));
    // "al2023" holds the few shared libraries (NSS, expat) that a minimal system lacks.
    for (const name of ["swiftshader.tar.br", "al2023.tar.br", "fonts.tar.br"]) untar(read(name), into);
    writeFileSync(join(into, "fonts.conf"), FONTS); // the packaged one names folders of another machine
    writeFileSync(join(into, "chromium"), read("chromium.br"), { mode: 0o755 });
  });
  const env: Record<string, string> = { LD_LIBRARY_PATH: join(folder, "lib") };
  // The packaged browser has a driver of its own, which names of others would hide from it.
  const own = /^(LD_LIBRARY_PATH|VK_(ADD_)?DRIVER_FILES|VK_ICD_FILENAMES)$/;
  for (const [name, value] of Object.entries(process.env)) {
    if (value !== undefined && !own.test(name)) env[name] = value;
  }
  if (!existsSync("/etc/fonts/fonts.conf")) env["FONTCONFIG_PATH"] ??= folder;
  return chromium.launch({ executablePath: join(folder, "chromium"), args: FLAGS, env });
}

/** Serves the repository on a free local port: `demo/`, `test/browser/` and the TypeScript they import. */
export async function serveSources(): Promise<ViteDevServer> {
  const server = await createServer({
    root: ROOT,
    configFile: false,
    appType: "mpa",
    logLevel: "error",
    define,
    resolve: { conditions: ["source", ...defaultClientConditions] },
    // Every dependency is an ES module already; bundling them would write to a folder that runs share.
    optimizeDeps: { noDiscovery: true, include: [] },
    server: { host: "127.0.0.1", port: 0, hmr: false, ws: false, watch: null },
  });
  return server.listen();
}

/**
 * Calls `body` with a fresh page and the source server's address (ending in a slash), and cleans up
 * afterwards.
 *
 * @throws what `body` throws; else an Error with every uncaught error of the page, so that none goes unseen
 */
export async function withPage<T>(body: (page: Page, baseUrl: string) => Promise<T>): Promise<T> {
  const [browser, server] = await Promise.all([launchChromium(), serveSources()]);
  try {
    const page = await browser.newPage();
    const failures: string[] = [];
    page.on("pageerror", (error) => failures.push(error.stack ?? error.message));
    const result = await body(page, server.resolvedUrls?.local[0] ?? "");
    if (failures.length > 0) throw new Error(`Uncaught in the page: ${failures.join("\n")}`);
    return result;
  } finally {
    await Promise.all([browser.close(), server.close()]);
  }
}

/**
 * Runs the default export of a module inside the page and returns what it resolves to, as JSON carries it.
 *
 * @param module path from the repository's root, e.g. "test/browser/harness.page.ts"
 * @param argument handed to the function
 * @throws Error with the stack as seen in the page
 */
export async function runInPage<T>(
  page: Page, baseUrl: string, module: string, argument: unknown = null,
): Promise<T> {
  const query = new URLSearchParams({ module: `/${module}`, argument: JSON.stringify(argument) });
  await page.goto(`${baseUrl}test/browser/run.html?${query}`);
  const outcome = await page.evaluate<{ value: T } | { error: string }>("globalThis.outcome");
  if ("error" in outcome) throw new Error(`${module} failed in the page: ${outcome.error}`);
  return outcome.value;
}
