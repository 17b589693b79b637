import { readFileSync } from "node:fs";
import { runCli } from "./args.ts";
import { bench } from "./commands/bench.ts";
import { doctor } from "./commands/doctor.ts";
import { generate } from "./commands/generate.ts";
import { info } from "./commands/info.ts";
import { logits } from "./commands/logits.ts";
import { quickstart } from "./commands/quickstart.ts";
import { train } from "./commands/train.ts";

// Both src/cli and dist/node lie two folders below package.json.
const { version } =
  JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8")) as { version: string };

process.exitCode = await runCli(
  [doctor, info, train, generate, logits, bench, quickstart], process.argv.slice(2), {
    version,
    summary: "Trains and runs hybrid Mamba-2 / attention / mixture-of-experts language models on WebGPU.",
  });
