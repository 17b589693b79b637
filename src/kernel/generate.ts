/** `npm run manifest`: writes src/kernel/manifest.ts from the shaders. */
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { kernelNames, manifestText } from "./reflect.ts";

const file = fileURLToPath(new URL("./manifest.ts", import.meta.url));
writeFileSync(file, manifestText((error) => {
  process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
}));
process.stdout.write(`manifest.ts: ${kernelNames().length} kernel files\n`);
