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
