import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join, relative, sep } from "node:path";
import { fileURLToPath } from "node:url";

// In a clone this file lies in src/kernel, in the package its build lies in dist/node.
const root = fileURLToPath(
  [new URL("../../shaders/", import.meta.url), new URL("../shaders/", import.meta.url)]
    .find((url) => existsSync(url)) ?? new URL("../../shaders/", import.meta.url));

const cache = new Map<string, string>();

/** WGSL text of a shader by its name, such as "norm/rms_norm"; undefined when there is none. */
export function shaderSource(name: string): string | undefined {
  const cached = cache.get(name);
  if (cached !== undefined) return cached;
  const file = join(root, `${name}.wgsl`);
  if (!existsSync(file)) return undefined;
  const text = readFileSync(file, "utf8");
  cache.set(name, text);
  return text;
}

/** Names of all shaders, the shared ones of `lib/` included. */
export function shaderNames(): string[] {
  return readdirSync(root, { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".wgsl"))
    .map((file) => relative(root, join(root, file)).split(sep).join("/").slice(0, -".wgsl".length))
    .sort();
}

// What chooses kernels and launches them: in a clone the ops, in the package all of its code.
const code = fileURLToPath(
  [new URL("../ops/", import.meta.url)].find((url) => existsSync(url)) ?? new URL("./", import.meta.url));

/** A hash of the code that chooses and launches kernels, 16 hexadecimal digits. */
export function codeHash(folder = code): string {
  const hash = createHash("sha256");
  for (const name of readdirSync(folder).filter((file) => /\.[jt]s$/.test(file)).sort()) {
    hash.update(`${name}\n`).update(readFileSync(join(folder, name)));
  }
  return hash.digest("hex").slice(0, 16);
}
