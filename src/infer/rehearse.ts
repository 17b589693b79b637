import type { NemotronHConfig } from "../models/config.ts";
import { NemotronH } from "../models/nemotron_h.ts";
import { createParameters, emptyWeights } from "../models/parameters.ts";
import { parseOffload } from "../nn/offload.ts";
import { parseRecompute } from "../nn/recompute.ts";
import type { Device } from "../tensor/device.ts";
import { makeRecipe, precisionOf, type Recipe, scheduleOf } from "../train/recipe.ts";
import { Trainer } from "../train/trainer.ts";
import { Generator } from "./engine.ts";

export interface RehearsalOptions {
  readonly recipe?: { readonly [key in keyof Recipe]?: Recipe[key] | undefined };
  readonly promptTokens?: number;
  /** Numbers of drafted tokens per pass to decode with. */
  readonly drafts?: readonly number[];
}

/**
 * Goes through a training step, a prompt and some decoding of a model without running any of it, so that
 * the device knows which kernels would be chosen between, and for what (`device.choices`).
 *
 * @param device  is of no use for anything else afterwards
 */
export async function rehearse(
  device: Device, config: NemotronHConfig, options: RehearsalOptions = {},
): Promise<void> {
  device.stream.muted = true;
  const recipe = makeRecipe(options.recipe ?? {});
  const model = new NemotronH(config, createParameters(device, config, 0, recipe.weights));
  const { batch, seqlen, accumulate } = recipe;
  const trainer = new Trainer(model, {
    ...recipe, schedule: scheduleOf(recipe), betas: [recipe.beta1, recipe.beta2],
    mtp_depths: model.mtp ? recipe.mtp_depths : 0, precision: precisionOf(recipe),
    recompute: parseRecompute(recipe.recompute), offload: parseOffload(recipe.offload),
  });
  const zeros = () => new Int32Array(batch * seqlen);
  const micro = {
    batch, seqlen, ids: new Int32Array(batch * (seqlen + 1)), input_ids: zeros(), labels: zeros(),
      seq_idx: zeros(),
    scored: batch * seqlen,
  };
  await trainer.step(Array.from({ length: accumulate }, () => micro));
  trainer.dispose();
  model.dispose();
  // Weights that are not trained, as for generating: some choices depend on it.
  const spoken = new NemotronH(config, emptyWeights(device, config));
  const prompt = new Array<number>(options.promptTokens ?? 256).fill(0);
  for (const draft of options.drafts ?? (spoken.mtp ? [0, 2] : [0])) {
    const generator = new Generator(spoken, prompt.length + 8 + draft);
    for await (const _ of generator.generate(prompt, { maxTokens: 8, draft })) {
      // tokens are not even computed
    }
    generator.dispose();
  }
  spoken.dispose();
}
