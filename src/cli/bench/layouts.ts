/**
 * The suite `layouts`: hybrid models under many layouts, all ranks on one device, beside one rank on the same
 * micro-batches. How far losses and gradients are apart, what a step takes, what it sends. A small model,
 * whose steps are as long as their launches, and a wide one, whose steps are products.
 */
import { median } from "../../gpu/measure.ts";
import type { NemotronHConfig } from "../../models/config.ts";
import { preset } from "../../models/presets.ts";
import { parseLayout, worldOf } from "../../parallel/layout.ts";
import { elementsOf, MeshModel } from "../../parallel/model.ts";
import { predictTraffic, totalBytes } from "../../parallel/traffic.ts";
import { Device } from "../../tensor/device.ts";
import { UsageError } from "../../tensor/errors.ts";
import { type Batch, IGNORED } from "../../train/packing.ts";
import { stateEntries } from "../../train/optimizer_state.ts";
import { constantSchedule } from "../../train/schedule.ts";
import { Trainer, type TrainerOptions } from "../../train/trainer.ts";
import { findConfig } from "../models.ts";
import type { Bench } from "./runner.ts";

const SUITE = "layouts";
/** Steps over which losses are compared. */
const STEPS = 20;

/** Every kind of layer, grouped queries, a latent width, a shared expert and a prediction head. */
export const LAYOUT_MODEL: NemotronHConfig = {
  ...preset("tiny"),
  vocab_size: 64, hidden_size: 32, num_hidden_layers: 6, hybrid_override_pattern: "M*EM-E",
  num_attention_heads: 8, num_key_value_heads: 4, head_dim: 8,
  mamba_num_heads: 8, mamba_head_dim: 8, n_groups: 4, ssm_state_size: 8, chunk_size: 8,
  intermediate_size: 32, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16,
  moe_latent_size: 16, moe_shared_expert_intermediate_size: 32, n_group: 1, topk_group: 1,
};

/** The same layers with products of hundreds of rows and columns. */
export const WIDE_MODEL: NemotronHConfig = {
  ...LAYOUT_MODEL,
  vocab_size: 1024, hidden_size: 256, head_dim: 32, mamba_num_heads: 16, mamba_head_dim: 32, n_groups: 8,
  ssm_state_size: 32, chunk_size: 64, intermediate_size: 512, moe_intermediate_size: 256,
  moe_latent_size: 128, moe_shared_expert_intermediate_size: 256,
};

/** Every axis by itself, every pair of them, and expert grids folded over the rest at world 8 and 16. */
export const LAYOUTS: readonly string[] = [
  "tp=2", "tp=4", "cp=2", "cp=2,cp_kind=allgather", "cp=2,cp_kind=alltoall", "cp=4", "dp=2", "dp=4",
  "pp=2", "pp=3", "pp=2,vpp=2", "tp=1,dp=2,ep=2", "dp=4,ep=4,dispatch=flex", "dp=2,ep=2,dispatch=allgather",
  "dp=2,ep=1,etp=2",
  "tp=2,cp=2", "tp=2,dp=2", "tp=2,pp=2", "tp=2,ep=2", "tp=2,etp=2", "cp=2,dp=2", "cp=2,pp=2", "cp=2,ep=2",
  "dp=2,pp=2", "dp=2,pp=2,ep=2", "dp=4,ep=2,etp=2",
  "tp=2,cp=2,dp=2,ep=4", "tp=2,cp=2,dp=2,ep=8", "tp=2,dp=2,pp=2,ep=4", "tp=2,dp=2,ep=2,etp=2",
  "tp=2,cp=2,pp=2,ep=4", "tp=2,cp=2,dp=2,pp=2,ep=4", "tp=2,cp=2,dp=2,pp=2,ep=2,etp=2",
  "tp=2,cp=2,dp=4,ep=8",
];

/** What a wider model is timed under: 2, 4 and 8 ranks. */
export const WIDE_LAYOUTS: readonly string[] = [
  "dp=2", "pp=2", "tp=2", "cp=2", "dp=2,ep=2", "tp=4", "cp=4", "tp=2,cp=2", "tp=2,dp=2,ep=4", "tp=8", "cp=8",
  "tp=2,cp=2,dp=2,ep=4", "tp=2,cp=2,pp=2,ep=4",
];

/** Rows and positions of a micro-batch. */
export interface LayoutSizes {
  readonly batch: number;
  readonly seqlen: number;
}

export const LAYOUT_SIZES: LayoutSizes = { batch: 2, seqlen: 32 };

/**
 * Micro-batches of random tokens, two documents a row.
 * @param ragged rows end early, each elsewhere: what is behind is not scored
 */
export function layoutBatches(
  count: number, ragged = false, { batch, seqlen }: LayoutSizes = LAYOUT_SIZES,
  vocab = LAYOUT_MODEL.vocab_size,
): Batch[] {
  let state = 17;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  return Array.from({ length: count }, (_, n) => {
    const ids = Int32Array.from(
      { length: batch * (seqlen + 1) }, () => Math.floor(next() * vocab));
    const rows = (value: (b: number, t: number) => number) =>
      Int32Array.from({ length: batch * seqlen }, (_value, i) => value(Math.floor(i / seqlen), i % seqlen));
    const cut = (b: number) => 9 + 5 * b + (n % 4);
    const end = (b: number) => (ragged ? 20 + 3 * b + 2 * (n % 4) : seqlen);
    const labels = rows((b, t) =>
      t + 1 === cut(b) || t >= end(b) ? IGNORED : ids[b * (seqlen + 1) + t + 1]!);
    return {
      batch, seqlen, ids, labels, input_ids: rows((b, t) => ids[b * (seqlen + 1) + t]!),
      seq_idx: rows((b, t) => (t < cut(b) ? 0 : 1)),
      scored: labels.reduce((sum, label) => sum + (label === IGNORED ? 0 : 1), 0),
    };
  });
}

/** A trainer of the model under a layout, on one device or that of every rank, from the same weights. */
export function startLayout(
  on: Device | readonly Device[], text: string, micros: number, config: NemotronHConfig = LAYOUT_MODEL,
  { bucket_size, ...options }: Partial<Omit<TrainerOptions, "accumulate">> & { bucket_size?: number } = {},
): { mesh: MeshModel; trainer: Trainer; dispose(): void } {
  const layout = parseLayout(text);
  const ranks = on instanceof Device ? Array<Device>(worldOf(layout)).fill(on) : on;
  const mesh = MeshModel.on(ranks, layout, config, "f32", bucket_size);
  try {
    mesh.initialise(5);
    const trainer = new Trainer(mesh, {
      ...LAYOUT_SIZES, accumulate: micros, schedule: constantSchedule({ peak: 3e-3, warmup: 0 }),
      betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: Infinity, mtp_depths: 1, mtp_scale: 0.3,
      aux_coeff: 1e-2, bias_rate: 1e-3, ...options,
    });
    return {
      mesh, trainer, dispose() {
        trainer.dispose();
        mesh.dispose();
      },
    };
  } catch (error) {
    mesh.dispose();
    throw error;
  }
}

/** The same; null for a layout whose rules the model does not fit. */
function startIfLegal(...args: Parameters<typeof startLayout>): ReturnType<typeof startLayout> | null {
  try {
    return startLayout(...args);
  } catch (error) {
    if (error instanceof UsageError) return null;
    throw error;
  }
}

/** After the first step, by parameter: the first moment, a tenth of its gradient. */
export async function firstGradients(
  { mesh, trainer }: Pick<ReturnType<typeof startLayout>, "mesh" | "trainer">,
): Promise<Map<string, Float32Array>> {
  const gradients = new Map<string, Float32Array>();
  for (const { name, dtype, bytes } of stateEntries(mesh, trainer.optimizers)) {
    if (!name.startsWith("m.")) continue;
    const read = bytes as () => Promise<Uint8Array>;
    gradients.set(name.slice(2), elementsOf(dtype, await read()) as Float32Array);
  }
  return gradients;
}

/** The largest ||a - b|| / ||b|| of any tensor, and whose it is. */
export function worstOf(
  found: ReadonlyMap<string, Float32Array>, expected: ReadonlyMap<string, Float32Array>,
): { name: string; error: number } {
  let worst = { name: "none", error: 0 };
  for (const [name, values] of expected) {
    const own = found.get(name)!;
    let [error, size] = [0, 0];
    values.forEach((value, i) => {
      error += (own[i]! - value) ** 2;
      size += value ** 2;
    });
    const relative = Math.sqrt(error / Math.max(size, 1e-24));
    if (!(relative <= worst.error)) worst = { name, error: relative };
  }
  return worst;
}

/** A model, what it is trained on and under which layouts. */
interface LayoutCase {
  /** Before the layout in the names of its cases. */
  readonly prefix: string;
  readonly config: NemotronHConfig;
  readonly sizes: LayoutSizes;
  /** Micro-batches of a step, and steps over which losses are compared. */
  readonly micros: number;
  readonly steps: number;
  readonly layouts: readonly string[];
}

export async function benchLayouts(bench: Bench): Promise<void> {
  const { config, batch, seqlen } = bench.options;
  const rest = { sizes: { batch, seqlen }, micros: 2, steps: 3, layouts: WIDE_LAYOUTS };
  const cases: LayoutCase[] = config === "tiny" ? [
    { prefix: "", config: LAYOUT_MODEL, sizes: LAYOUT_SIZES, micros: 8, steps: STEPS, layouts: LAYOUTS },
    { prefix: "wide ", config: WIDE_MODEL, ...rest },
  ] : [{ prefix: `${config} `, config: findConfig(config), ...rest }];
  for (const one of cases) await benchModel(bench, one);
}

async function benchModel(
  bench: Bench, { prefix, config, sizes, micros, steps, layouts }: LayoutCase,
): Promise<void> {
  const { device, options } = bench;
  const batches = layoutBatches(micros, false, sizes, config.vocab_size);
  const start = async () => {
    const run = startLayout(device, "tp=1", micros, config, sizes);
    const losses: number[] = [];
    let gradients = new Map<string, Float32Array>();
    for (let step = 0; step < steps; step++) {
      losses.push((await run.trainer.step(batches)).loss);
      if (step === 0) gradients = await firstGradients(run);
    }
    return { ...run, losses, gradients };
  };
  let one: Awaited<ReturnType<typeof start>> | null = null;
  for (const text of layouts) {
    if (!bench.wants(SUITE, `${prefix}${text}`)) continue;
    const other = startIfLegal(device, text, micros, config, sizes);
    if (!other) continue;
    one ??= await start();
    let worst = { name: "none", error: 0 };
    let losses = 0;
    for (let step = 0; step < steps; step++) {
      const { loss } = await other.trainer.step(batches);
      if (step === 0) worst = worstOf(await firstGradients(other), one.gradients);
      losses = Math.max(losses, Math.abs(loss / one.losses[step]! - 1));
    }
    const times: [number[], number[]] = [[], []];
    const launches = [0, 0];
    for (let run = 0; run < options.runs; run++) {
      for (const [i, { trainer }] of [other, one].entries()) {
        const [since, before] = [performance.now(), device.stream.dispatches];
        await trainer.step(batches);
        times[i]!.push(performance.now() - since);
        launches[i] = device.stream.dispatches - before;
      }
    }
    const ratios = times[0].map((ms, i) => ms / times[1][i]!).sort((a, b) => a - b);
    const ratio = median(ratios);
    const { layout, world } = other.mesh;
    const rows = predictTraffic(layout, config, { ...sizes, micro_batches: micros / layout.dp });
    const sent = rows.reduce((sum, rank) => sum + totalBytes(rank), 0) * (world / layout.pp);
    other.dispose();
    await bench.add({
      suite: SUITE, case: `${prefix}${text}`, times: times[0].sort((a, b) => a - b), unit: "ms", work: 1,
      details: {
        world, loss_error: losses, gradient_error: worst.error, gradient: worst.name, to_one_rank: ratio,
        to_one_rank_min: ratios[0]!, to_one_rank_max: ratios.at(-1)!, launches: launches[0]!,
        launches_one_rank: launches[1]!, bytes_sent: sent, hidden_size: config.hidden_size, ...sizes,
        micro_batches: micros,
      },
      remark: `${world} ranks, ${ratio.toFixed(2)}x one (${ratios[0]!.toFixed(2)} to ` +
        `${ratios.at(-1)!.toFixed(2)}), ${(launches[0]! / launches[1]!).toFixed(1)}x the launches; ` +
        `losses ${losses.toExponential(1)}, gradients ${worst.error.toExponential(1)}`,
    });
  }
  one?.dispose();
}
