/** A small hybrid model trained under a layout, and how far it is from one rank. */
import type { NemotronHConfig } from "../../src/models/config.ts";
import { preset } from "../../src/models/presets.ts";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { Device } from "../../src/tensor/device.ts";
import { type Batch, IGNORED } from "../../src/train/packing.ts";
import { elementsOf } from "../../src/parallel/model.ts";
import { stateEntries } from "../../src/train/optimizer_state.ts";
import { constantSchedule } from "../../src/train/schedule.ts";
import { type HeldBytes, type StepMetrics, Trainer, type TrainerOptions } from "../../src/train/trainer.ts";
import { Draw } from "../ops/suite.ts";

/** Every kind of layer, grouped queries, a latent width, a shared expert and a prediction head. */
export const SMALL: NemotronHConfig = {
  ...preset("tiny"),
  vocab_size: 64, hidden_size: 32, num_hidden_layers: 6, hybrid_override_pattern: "M*EM-E",
  num_attention_heads: 8, num_key_value_heads: 4, head_dim: 8,
  mamba_num_heads: 8, mamba_head_dim: 8, n_groups: 4, ssm_state_size: 8, chunk_size: 8,
  intermediate_size: 32, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16,
  moe_latent_size: 16, moe_shared_expert_intermediate_size: 32, n_group: 1, topk_group: 1,
};

export const SIZES = { batch: 2, seqlen: 32 } as const;

/** Micro-batches of two documents a row; the positions behind them are not scored. */
export function smallBatches(count: number, ragged: boolean, vocab = SMALL.vocab_size): Batch[] {
  const { batch, seqlen } = SIZES;
  const r = new Draw(17);
  return Array.from({ length: count }, (_, n) => {
    const ids = Int32Array.from({ length: batch * (seqlen + 1) }, () => Math.floor(r.next() * vocab));
    const rows = (value: (b: number, t: number) => number) =>
      Int32Array.from({ length: batch * seqlen }, (_value, i) => value(Math.floor(i / seqlen), i % seqlen));
    const cut = (b: number) => 9 + 5 * b + n;
    const end = (b: number) => (ragged ? 20 + 3 * b + 2 * n : seqlen);
    const labels = rows((b, t) =>
      t + 1 === cut(b) || t >= end(b) ? IGNORED : ids[b * (seqlen + 1) + t + 1]!);
    return {
      batch, seqlen, ids, labels, input_ids: rows((b, t) => ids[b * (seqlen + 1) + t]!),
      seq_idx: rows((b, t) => (t < cut(b) ? 0 : 1)),
      scored: labels.reduce((sum, label) => sum + (label === IGNORED ? 0 : 1), 0),
    };
  });
}

export interface Outcome {
  readonly steps: readonly StepMetrics[];
  /** By name: "m." and a parameter's name for its gradient in the first step. */
  readonly gradients: ReadonlyMap<string, Float32Array>;
  readonly parameters: ReadonlyMap<string, Float32Array>;
  /** Moments of all ranks. */
  readonly optimizerBytes: number;
  /** Of one rank at every place in the pipeline. */
  readonly held: readonly HeldBytes[];
}

/**
 * Trains under a layout, on one device or on that of every rank.
 * @param steps of which the first tells the gradients: the first moment is a tenth of one then
 */
export async function trainSmall(
  on: Device | readonly Device[], layoutText: string, batches: readonly Batch[],
  { steps = 1, config = SMALL, after, ...options }: Partial<Omit<TrainerOptions, "steps">> & {
    steps?: number; config?: NemotronHConfig; after?: (step: number) => void;
  } = {},
): Promise<Outcome> {
  const layout = parseLayout(layoutText);
  const ranks = on instanceof Device ? Array<Device>(worldOf(layout)).fill(on) : on;
  const mesh = MeshModel.on(ranks, layout, config);
  mesh.initialise(5);
  const trainer = new Trainer(mesh, {
    ...SIZES, accumulate: batches.length, schedule: constantSchedule({ peak: 3e-3, warmup: 0 }),
    betas: [0.9, 0.95], eps: 1e-8,
    weight_decay: 0.1, clip: Infinity, mtp_depths: 1, mtp_scale: 0.3, aux_coeff: 1e-2, bias_rate: 1e-3,
    ...options,
  });
  try {
    const metrics: StepMetrics[] = [];
    const gradients = new Map<string, Float32Array>();
    for (let step = 0; step < steps; step++) {
      metrics.push(await trainer.step(batches));
      after?.(step);
      if (step > 0) continue;
      for (const { name, dtype, bytes } of stateEntries(mesh, trainer.optimizers)) {
        if (!name.startsWith("m.")) continue;
        const read = bytes as () => Promise<Uint8Array>;
        gradients.set(name, elementsOf(dtype, await read()) as Float32Array);
      }
    }
    const parameters = new Map<string, Float32Array>();
    for (const name of mesh.parameters.keys()) parameters.set(name, await mesh.read(name));
    const states = trainer.optimizers.flatMap(({ state }) => state);
    const optimizerBytes = states.reduce((sum, { byteLength }) => sum + byteLength, 0);
    return { steps: metrics, gradients, parameters, optimizerBytes, held: trainer.heldByRank! };
  } finally {
    trainer.dispose();
    mesh.dispose();
  }
}

/** ||a - b|| / ||b|| */
export function relativeError(a: Float32Array, b: Float32Array): number {
  let [error, size] = [0, 0];
  b.forEach((value, i) => {
    error += (a[i]! - value) ** 2;
    size += value ** 2;
  });
  return Math.sqrt(error / Math.max(size, 1e-24));
}

/** The largest relative error of any tensor, and whose it is. */
export function worstOf(
  found: ReadonlyMap<string, Float32Array>, expected: ReadonlyMap<string, Float32Array>,
): { name: string; error: number } {
  let worst = { name: "none", error: 0 };
  for (const [name, values] of expected) {
    const error = relativeError(found.get(name)!, values);
    if (!(error <= worst.error)) worst = { name, error };
  }
  return worst;
}
