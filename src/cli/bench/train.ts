/** The suite `train`: whole training steps, with and without recomputation. */
import { forwardFlops, memoryToTrain } from "../../models/accounting.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import { NemotronH } from "../../models/nemotron_h.ts";
import { createParameters } from "../../models/parameters.ts";
import { byteTokenizer } from "../../text/byte_tokenizer.ts";
import { splitDocuments } from "../../train/data.ts";
import { readDocuments } from "../../train/data.node.ts";
import { tokenizeDocuments } from "../../train/packing.ts";
import { makeRecipe, type Recipe } from "../../train/recipe.ts";
import { TrainingRun } from "../../train/run.ts";
import { findConfig } from "../models.ts";
import { packagePath } from "../package.ts";
import { formatBytes } from "../terminal.ts";
import type { Bench } from "./runner.ts";

const SUITE = "train";

/** A run on the given text, or on this package's README. The caller disposes of run and model. */
export function startRun(bench: Bench, config: NemotronHConfig, given: Partial<Recipe>): TrainingRun {
  const { device, options: { data } } = bench;
  const split = splitDocuments(readDocuments(data.length > 0 ? data : [packagePath("README.md")]));
  const tokenizer = byteTokenizer(config.vocab_size);
  const model = new NemotronH(config, createParameters(device, config, 0, given.weights));
  return new TrainingRun(
    model, makeRecipe(given), tokenizeDocuments(split.train, tokenizer),
    tokenizeDocuments(split.validation, tokenizer));
}

/** Floating-point operations of one training step, as the model needs them. */
export function stepFlops(config: NemotronHConfig, recipe: Recipe): number {
  const { batch, seqlen, accumulate, mtp_depths } = recipe;
  const depths = config.num_nextn_predict_layers > 0 ? mtp_depths : 0;
  return 3 * accumulate * batch * seqlen * forwardFlops(config, (seqlen + 1) / 2, depths);
}

export async function benchTrain(bench: Bench): Promise<void> {
  const { device, options } = bench;
  const config = findConfig(options.config);
  for (const recompute of [false, true]) {
    const { batch, seqlen } = makeRecipe({});
    const name = `step_${options.config}_${batch}x${seqlen}${recompute ? "_recompute" : ""}`;
    if (!bench.wants(SUITE, name)) continue;
    device.pool.trim();
    device.pool.resetPeak();
    const before = device.pool.liveBytes;
    const run = startRun(bench, config, { steps: options.runs + 2, recompute: recompute ? "full" : "off" });
    const cold = performance.now();
    await run.step();
    const first_step_ms = performance.now() - cold;
    await run.step();
    const counts = () => [
      device.stream.dispatches, device.stream.submits, device.pool.created,
        device.bindGroupsCreated] as const;
    const start = counts();
    const times: number[] = [];
    for (let i = 0; i < options.runs; i++) {
      const since = performance.now();
      await run.step();
      times.push(performance.now() - since);
    }
    const [launches, submits, buffers, groups] =
      counts().map((count, i) => (count - start[i]!) / options.runs) as [number, number, number, number];
    const peak_bytes = device.pool.peakBytes - before;
    run.dispose();
    run.model.dispose();
    const flops = stepFlops(config, run.recipe);
    await bench.add({
      suite: SUITE, case: name, times: times.sort((a, b) => a - b), unit: "tokens/s", work: batch * seqlen,
      bound: { by: "matmul", work: flops },
      details: {
        model_flops: flops, launches, submits, buffers_created: buffers, bind_groups_created: groups,
        peak_bytes, estimated_bytes: memoryToTrain(config, batch * seqlen).total, first_step_ms,
      },
      remark: `${launches} launches, peak ${formatBytes(peak_bytes)}`,
    });
  }
}
