// Lets plain Node run this clone's TypeScript: types are stripped file by file as they are imported, and the
// package name resolves to `src` (export condition "source"). The packed package has `dist` and never loads
// this file.
//
//   node src/cli/source.mjs FILE.ts [ARGUMENTS...]
import { readFileSync } from "node:fs";
import { register } from "node:module";
import { resolve as resolvePath } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { isMainThread } from "node:worker_threads";

export async function resolve(specifier, context, nextResolve) {
  return nextResolve(specifier, { ...context, conditions: [...context.conditions, "source"] });
}

export async function load(url, context, nextLoad) {
  if (!url.startsWith("file:") || !url.endsWith(".ts")) return nextLoad(url, context);
  const { transformSync } = await import("rolldown/utils");
  const file = fileURLToPath(url);
  const result = transformSync(file, readFileSync(file, "utf8"), { sourcemap: true });
  if (result.errors.length > 0) throw new SyntaxError(`${file}: ${result.errors[0].message}`);
  const map = Buffer.from(JSON.stringify(result.map)).toString("base64");
  const source = `${result.code}\n//# sourceMappingURL=data:application/json;base64,${map}`;
  return { format: "module", source, shortCircuit: true };
}

if (isMainThread) {
  register(import.meta.url);
  process.setSourceMapsEnabled?.(true);
  const script = process.argv[2];
  if (script && resolvePath(process.argv[1]) === fileURLToPath(import.meta.url)) {
    process.argv.splice(1, 1);
    await import(pathToFileURL(resolvePath(script)).href);
  }
}
