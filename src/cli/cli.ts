import { type CliOptions, runCli } from "./args.ts";
import { bench } from "./commands/bench.ts";
import { doctor } from "./commands/doctor.ts";
import { exportCommand } from "./commands/export.ts";
import { generate } from "./commands/generate.ts";
import { info } from "./commands/info.ts";
import { layout } from "./commands/layout.ts";
import { logits } from "./commands/logits.ts";
import { plan } from "./commands/plan.ts";
import { quantize } from "./commands/quantize.ts";
import { numerics } from "./commands/numerics.ts";
import { quickstart } from "./commands/quickstart.ts";
import { train } from "./commands/train.ts";
import { tune } from "./commands/tune.ts";
import { upcycle } from "./commands/upcycle.ts";
import { packageVersion } from "./package.ts";

/**
 * Runs a command line.
 *
 * @param options other streams, or another signal, than those of this process
 * @returns the exit code
 */
export function cli(
  argv: readonly string[], options: Pick<CliOptions, "io" | "signal"> = {},
): Promise<number> {
  const commands = [
    doctor, info, train, generate, logits, quantize, upcycle, bench, tune, numerics, layout, plan,
    exportCommand, quickstart,
  ];
  return runCli(commands, argv, {
    ...options,
    version: packageVersion(),
    summary: "Trains and runs hybrid Mamba-2 / attention / mixture-of-experts language models on WebGPU.",
  });
}
