/**
 * Bytes that a rank of a layout needs in training, part by part: a formula, not a measurement.
 *
 * Parameters, gradients and optimiser state follow the distributed optimiser's rules (each of the d ranks
 * that hold the same parameters keeps 1/d of the state), activations what the backward pass of each kind of
 * layer reads, times the micro-batches that a stage holds at a time. Widths of number formats are options.
 */
import type { Recompute as Modules } from "../nn/recompute.ts";
import {
  type ActivationPart, type Kept, keptAround, keptBy, type KraitKernels, type MemoryLayout, tokensOf,
} from "./kept.ts";
import type { StepSizes } from "./layout.ts";
import { addShares, countEqual, layerShares, mtpShares } from "./model_shape.ts";
import type { ModelShape, ParameterShares, ShapeLayer } from "./model_shape.ts";
import { scheduleOf } from "./schedule.ts";

export type { MemoryLayout } from "./kept.ts";
export { tokensOf } from "./kept.ts";

/** What the backward pass computes again instead of keeping it. */
export const RECOMPUTES = ["none", "selective", "moe", "full"] as const;
/**
 * `selective`: outputs of norms and activations, and the up-projections of latent attention; `moe`: that, and
 * whole layers of experts with their exchange; `full`: all but the inputs of the layers.
 */
export type Recompute = (typeof RECOMPUTES)[number];

/** Layers that run again as wholes, and modules that do: names of `Kept.again`. */
export type Again = Pick<Modules, "layers" | "first"> & { readonly modules: ReadonlySet<string> };

const SELECTIVE = ["layernorm", "activations", "mla_up_proj"];
const LEVELS: Readonly<Record<Recompute, Again>> = {
  none: { layers: 0, first: 0, modules: new Set() },
  selective: { layers: 0, first: 0, modules: new Set(SELECTIVE) },
  moe: { layers: 0, first: 0, modules: new Set([...SELECTIVE, "moe"]) },
  full: { layers: 1, first: Infinity, modules: new Set() },
};

/** Bytes of one number. */
export interface Widths {
  readonly parameter: number;
  readonly gradient: number;
  /** Master copy of the weights; 0 where they are their own. */
  readonly master: number;
  /** Both moments together. */
  readonly moments: number;
  readonly activation: number;
  /** Saved inputs of products that compute in fewer bits. */
  readonly productInput: number;
  /** Quantised copies of the weights, both ways; 0: none. */
  readonly quantised: number;
  readonly logit: number;
}

/** bf16 weights and activations, f32 gradients, masters and moments. */
export const BF16_TRAINING: Widths = {
  parameter: 2, gradient: 4, master: 4, moments: 8, activation: 2, productInput: 2, quantised: 0, logit: 4,
};
/** Everything in f32. */
export const F32_TRAINING: Widths = {
  parameter: 4, gradient: 4, master: 0, moments: 8, activation: 4, productInput: 4, quantised: 0, logit: 4,
};

export interface MemoryOptions {
  readonly widths: Widths;
  /** A level of the published kernels, or what `krait train --recompute` says. */
  readonly recompute: Recompute | Again;
  /** What Krait's own kernels keep, instead of what published ones do. */
  readonly krait?: KraitKernels;
  /** What data-parallel ranks share among them: nothing, the optimiser's state, or everything (FSDP). */
  readonly sharding: "none" | "optimizer" | "all";
  /** Which layers lie where; default: as many layers on each chunk, the first ones one more. */
  readonly stages?: Pipeline;
}

/** What one chunk of a pipeline holds. */
export interface Chunk {
  readonly layers: readonly ShapeLayer[];
  readonly embedding: boolean;
  /** Final norm, head, loss and prediction block. */
  readonly head: boolean;
  /** Of these, where they lie elsewhere than the head. */
  readonly norm?: boolean;
  readonly mtp?: boolean;
}
/** The chunks of each pipeline rank, in the order in which they run. */
export type Pipeline = readonly (readonly Chunk[])[];

/** What the backward pass keeps, by what it belongs to. `head`: its input, logits and prediction block. */
export type ActivationParts = Readonly<Record<ActivationPart, number>>;

export interface RankMemory {
  /** Position in the pipeline. */
  readonly rank: number;
  readonly parameters: number;
  readonly gradients: number;
  readonly optimizer: number;
  readonly activations: ActivationParts;
  /** Messages between stages, exchanged tokens and gathered parameters that live only for a while. */
  readonly buffers: number;
  readonly total: number;
}

/** The memory of the most loaded rank of a layout. */
export function predictMemory(
  shape: ModelShape, layout: MemoryLayout, sizes: StepSizes, options: MemoryOptions,
): RankMemory {
  const stages = options.stages ?? evenChunks(shape, layout.pp, layout.vpp);
  const ranks = stages.map((_, rank) => rankMemory(shape, layout, sizes, { ...options, stages }, rank));
  return ranks.reduce((most, each) => each.total > most.total ? each : most);
}

/** The memory of the ranks at one position of the pipeline. */
export function rankMemory(
  shape: ModelShape, layout: MemoryLayout, sizes: StepSizes,
  options: MemoryOptions & { readonly stages: Pipeline }, rank: number,
): RankMemory {
  const { tp, cp, dp, ep, etp, edp } = layout;
  const { widths, sharding } = options;
  const chunks = options.stages[rank]!;
  const shares = chunkShares(shape, chunks);
  const dense = shares.cut / tp + shares.whole;
  const expert = shares.expert / (ep * etp);
  const [denseRanks, expertRanks] = [dp * cp, edp];
  const over = (share: "all" | "optimizer") => sharding === "all" || sharding === share
    ? dense / denseRanks + expert / expertRanks : dense + expert;
  const held = over("all");
  const owned = over("optimizer");

  const tokens = tokensOf(layout, sizes);
  const activations = chunkActivations(shape, layout, sizes, options, chunks, rank);
  // A message in and one out, in each direction; tokens on their way to experts and back; and under FSDP
  // two layers' parameters and gradients, gathered.
  const messages = layout.pp > 1 ? 4 * tokens.cut * shape.hidden * widths.activation : 0;
  const kinds = new Set(chunks.flatMap(({ layers }) => layers));
  const largest = (of: (layer: ShapeLayer) => number) => Math.max(0, ...[...kinds].map(of));
  const exchange = largest((layer) => layer.kind !== "moe" || ep * etp === 1 ? 0
    : 2 * tokens.cut * layer.topk * (layer.latent ?? shape.hidden) * widths.activation);
  const gathered = sharding !== "all" ? 0 : 2 * largest((layer) => {
    const { cut, whole, expert: experts } = layerShares(shape.hidden, layer);
    return (cut / tp + whole + experts / (ep * etp)) * (widths.parameter + widths.gradient / 2);
  });
  const buffers = messages + exchange + gathered;
  const parts = {
    parameters: held * (widths.parameter + widths.quantised), gradients: held * widths.gradient,
    optimizer: owned * (widths.master + widths.moments),
  };
  const kept = Object.values(activations).reduce((sum, bytes) => sum + bytes, 0);
  const total = parts.parameters + parts.gradients + parts.optimizer + kept + buffers;
  return { rank, ...parts, activations, buffers, total };
}

function chunkShares(shape: ModelShape, chunks: readonly Chunk[]): ParameterShares {
  const table = shape.vocab * shape.hidden;
  return addShares(chunks.flatMap(({ layers, embedding, head }) => [
    ...layers.map((layer) => layerShares(shape.hidden, layer)),
    { cut: (embedding ? table : 0) + (head ? table : 0), whole: head ? shape.hidden : 0, expert: 0 },
    ...(head ? [mtpShares(shape)] : []),
  ]));
}

/**
 * How many forward passes of a chunk a rank holds before their backward passes: min(M, P - p) in a plain
 * pipeline; in an interleaved one the 2 (P - p - 1) + (V - 1) P of its warm-up and the running one, shared
 * out evenly over its V chunks.
 */
export function liveMicroBatches({ pp, vpp }: MemoryLayout, microBatches: number, rank: number): number {
  if (vpp === 1) return Math.min(microBatches, pp - rank);
  return Math.min(microBatches * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1) / vpp;
}

function chunkActivations(
  shape: ModelShape, layout: MemoryLayout, sizes: StepSizes, options: MemoryOptions,
  chunks: readonly Chunk[], rank: number,
): ActivationParts {
  if (options.krait) return peakActivations(shape, layout, sizes, options, chunks, rank);
  const live = liveMicroBatches(layout, sizes.micro_batches, rank);
  const sum = { ...NO_ACTIVATIONS };
  const tokens = tokensOf(layout, sizes);
  const { widths } = options;
  const partsOf = (layer: ShapeLayer) => layerActivations(shape.hidden, layer, layout, sizes, options);
  const counts = countEqual(chunks.flatMap(({ layers }) => layers));
  for (const [layer, count] of counts) add(sum, partsOf(layer), count * live);
  if (chunks.some(({ embedding }) => embedding)) add(sum, { embedding: 8 * tokens.whole }, live);
  if (chunks.some(({ head }) => head)) {
    // The last chunk's backward pass follows its forward pass at once.
    for (const layer of shape.mtp) add(sum, { head: total(partsOf(layer)) }, shape.mtpDepths);
    const logits = (tokens.whole * shape.vocab * widths.logit) / layout.tp;
    const inputs = 2 * tokens.cut * shape.hidden * widths.activation;
    add(sum, { head: (inputs + logits) * (1 + shape.mtpDepths) }, 1);
  }
  return sum;
}

/** What is alive on a rank of Krait's schedule when that is most. */
function peakActivations(
  shape: ModelShape, layout: MemoryLayout, sizes: StepSizes, options: MemoryOptions,
  chunks: readonly Chunk[], rank: number,
): ActivationParts {
  const each = chunks.map((chunk) => onePass(shape, layout, sizes, options, chunk));
  const { pp, vpp, micro_batch_group = pp, overlap = false } = layout;
  const passes = pp === 1 && !overlap ? []
    : scheduleOf({ pp, vpp, micro_batch_group, overlap }, sizes.micro_batches).ranks[rank]!;
  const alive = chunks.map(() => 0);
  let most = { bytes: 0, alive: chunks.map(() => 1) };
  // Of two passes at once the one that goes back is counted first, as measured: it frees what the other
  // takes.
  const order = passes.toSorted((a, b) => (a.pair === undefined || a.pair !== b.pair ? 0
    : Number(a.kind === "forward") - Number(b.kind === "forward")));
  for (const { kind, chunk } of order) {
    alive[chunk]! += kind === "forward" ? 1 : -1;
    const bytes = each.reduce((sum, parts, i) => sum + total(parts) * alive[i]!, 0);
    if (bytes > most.bytes) most = { bytes, alive: [...alive] };
  }
  const sum = { ...NO_ACTIVATIONS };
  each.forEach((parts, i) => add(sum, parts, most.alive[i]!));
  return sum;
}

/** What one micro-batch leaves in a chunk. */
function onePass(
  shape: ModelShape, layout: MemoryLayout, sizes: StepSizes, options: MemoryOptions, chunk: Chunk,
): ActivationParts {
  const sum = { ...NO_ACTIVATIONS };
  const { layers: together, first } = againOf(options.recompute);
  const place = { hidden: shape.hidden, layout, sizes, krait: options.krait ?? null };
  chunk.layers.forEach((layer, i) => {
    const isAgain = together > 0 && i < first;
    const how = !isAgain ? "once" : i % together === 0 ? "first" : "inside";
    add(sum, bytesOf(keptBy(layer, place), options, how), 1);
  });
  const { head, norm = head, mtp = head && shape.mtp.length > 0 } = chunk;
  const depths = mtp ? shape.mtpDepths : 0;
  shape.mtp.forEach((layer, i) => {
    const how = together === 0 || first < Infinity ? "once" : i % together === 0 ? "first" : "inside";
    add(sum, { head: total(bytesOf(keptBy(layer, place), options, how)) }, depths);
  });
  add(sum, bytesOf(keptAround({ norm, mtp: depths > 0, head }, shape, place), options, "once"), 1);
  return sum;
}

type Sum = { -readonly [part in ActivationPart]: number };

function add(sum: Sum, parts: Partial<ActivationParts>, times: number): void {
  for (const [part, bytes] of Object.entries(parts)) sum[part as ActivationPart] += bytes * times;
}

const NO_ACTIVATIONS = {
  mamba: 0, attention: 0, mlp: 0, router: 0, experts: 0, shared: 0, embedding: 0, head: 0,
};

function total(parts: Partial<ActivationParts>): number {
  return Object.values(parts).reduce((sum, bytes) => sum + bytes, 0);
}

function againOf(recompute: Recompute | Again): Again {
  return typeof recompute === "string" ? LEVELS[recompute] : recompute;
}

/** Bytes that one micro-batch leaves in a layer for its backward pass. */
export function layerActivations(
  hidden: number, layer: ShapeLayer, layout: MemoryLayout, sizes: StepSizes,
  options: Pick<MemoryOptions, "widths" | "recompute" | "krait">,
): Partial<ActivationParts> {
  const how = againOf(options.recompute).layers > 0 ? "first" : "once";
  return bytesOf(keptBy(layer, { hidden, layout, sizes, krait: options.krait ?? null }), options, how);
}

/**
 * Bytes of what is kept.
 * @param how once: all but what recomputed modules make again; of a layer that runs again as a whole what it
 *   starts from, unless it is `inside` several such layers, and what stays
 */
function bytesOf(
  list: readonly Kept[], { widths, recompute }: Pick<MemoryOptions, "widths" | "recompute">,
  how: "once" | "first" | "inside",
): Partial<ActivationParts> {
  const { modules } = againOf(recompute);
  const sum: Partial<Sum> = {};
  for (const { part, numbers, as, again = [], instead, stream, stays } of list) {
    const isKept = how === "once"
      ? !again.some((name) => modules.has(name)) && (instead === undefined || modules.has(instead))
      : (stream && how === "first") || stays;
    if (!isKept) continue;
    const width = as === "exact" ? 4 : as === "product" ? widths.productInput : widths.activation;
    sum[part] = (sum[part] ?? 0) + numbers * width;
  }
  return sum;
}

/** As many units of layers on each chunk, the first ones one more; chunk v of rank p is number v P + p. */
export function evenChunks(shape: ModelShape, pp: number, vpp: number): Pipeline {
  const units = Math.ceil(shape.layers.length / shape.unit);
  const count = pp * vpp;
  const sizes = Array.from({ length: count }, (_, i) =>
    Math.floor(units / count) + (i < units % count ? 1 : 0));
  return chunksOf(shape, pp, sizes);
}

/** Pipeline from the number of units in each chunk, in the order of the layers. */
export function chunksOf(shape: ModelShape, pp: number, unitsPerChunk: readonly number[]): Pipeline {
  const stages: Chunk[][] = Array.from({ length: pp }, () => []);
  let at = 0;
  unitsPerChunk.forEach((units, i) => {
    const end = at + units * shape.unit;
    stages[i % pp]!.push({
      layers: shape.layers.slice(at, end), embedding: i === 0, head: i === unitsPerChunk.length - 1,
    });
    at = end;
  });
  return stages;
}
