/**
 * Bytes that a rank of a layout needs in training, part by part: a formula, not a measurement.
 *
 * Parameters, gradients and optimiser state follow the distributed optimiser's rules (each of the d ranks
 * that hold the same parameters keeps 1/d of the state), activations what the backward pass of each kind of
 * layer reads, times the micro-batches that a stage holds at a time. Widths of number formats are options.
 */
import type { StepSizes } from "./layout.ts";
import { addShares, countEqual, layerShares, mtpShares } from "./model_shape.ts";
import type { ModelShape, ParameterShares, ShapeLayer } from "./model_shape.ts";

/** What the memory of a layout depends on: a Layout has these. */
export interface MemoryLayout {
  readonly tp: number;
  readonly cp: number;
  readonly dp: number;
  readonly pp: number;
  readonly ep: number;
  readonly etp: number;
  readonly edp: number;
  readonly vpp: number;
  readonly sp: boolean;
}

/** What the backward pass computes again instead of keeping it. */
export const RECOMPUTES = ["none", "selective", "moe", "full"] as const;
/**
 * `selective`: outputs of norms and activations, and the up-projections of latent attention; `moe`: that, and
 * whole layers of experts with their exchange; `full`: all but the inputs of the layers.
 */
export type Recompute = (typeof RECOMPUTES)[number];

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
  readonly recompute: Recompute;
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
}
/** The chunks of each pipeline rank, in the order in which they run. */
export type Pipeline = readonly (readonly Chunk[])[];

/** What the backward pass keeps, by what it belongs to. */
export interface ActivationParts {
  readonly mamba: number;
  readonly attention: number;
  readonly mlp: number;
  readonly router: number;
  readonly experts: number;
  readonly shared: number;
  readonly embedding: number;
  /** Input of the head, logits and prediction block. */
  readonly head: number;
}

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

/** Tokens of a rank in a micro-batch: of the sequence's part under cp, and of that the part under tp. */
export function tokensOf({ tp, cp, sp }: MemoryLayout, { batch, seqlen }: StepSizes) {
  const whole = (batch * seqlen) / cp;
  return { whole, cut: sp ? whole / tp : whole };
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
  const live = liveMicroBatches(layout, sizes.micro_batches, rank);
  const sum = { ...NO_ACTIVATIONS };
  const add = (parts: Partial<ActivationParts>, times: number): void => {
    for (const [part, bytes] of Object.entries(parts)) sum[part as keyof ActivationParts] += bytes * times;
  };
  const tokens = tokensOf(layout, sizes);
  const { widths } = options;
  const partsOf = (layer: ShapeLayer) => layerActivations(shape.hidden, layer, layout, sizes, options);
  const counts = countEqual(chunks.flatMap(({ layers }) => layers));
  for (const [layer, count] of counts) add(partsOf(layer), count * live);
  if (chunks.some(({ embedding }) => embedding)) add({ embedding: 8 * tokens.whole }, live);
  if (chunks.some(({ head }) => head)) {
    // The last chunk's backward pass follows its forward pass at once.
    for (const layer of shape.mtp) add({ head: total(partsOf(layer)) }, shape.mtpDepths);
    const logits = (tokens.whole * shape.vocab * widths.logit) / layout.tp;
    const inputs = 2 * tokens.cut * shape.hidden * widths.activation;
    add({ head: (inputs + logits) * (1 + shape.mtpDepths) }, 1);
  }
  return sum;
}

const NO_ACTIVATIONS = {
  mamba: 0, attention: 0, mlp: 0, router: 0, experts: 0, shared: 0, embedding: 0, head: 0,
};

function total(parts: Partial<ActivationParts>): number {
  return Object.values(parts).reduce((sum, bytes) => sum + bytes, 0);
}

/** Bytes that one micro-batch leaves in a layer for its backward pass. */
export function layerActivations(
  hidden: number, layer: ShapeLayer, layout: MemoryLayout, sizes: StepSizes,
  { widths, recompute }: Pick<MemoryOptions, "widths" | "recompute">,
): Partial<ActivationParts> {
  const { tp, etp } = layout;
  const tokens = tokensOf(layout, sizes);
  const { activation: a, productInput: p } = widths;
  // The residual stream, which is the norm's input; the norm's output, which products read.
  const stream = tokens.cut * hidden * a;
  const again = recompute !== "none";
  const normed = again ? 0 : tokens.cut * hidden * p;
  if (recompute === "full" || (recompute === "moe" && layer.kind === "moe")) {
    return layer.kind === "moe" ? { router: stream } : { [PART_OF[layer.kind]]: stream };
  }
  switch (layer.kind) {
    case "attention": {
      const { heads, kvHeads, headDim } = layer;
      const keys = Math.max(kvHeads / tp, 1);
      const [queries, context] = [(heads / tp) * headDim, (heads / tp) * headDim];
      const each = (queries + 2 * keys * headDim) * a + context * a + (heads / tp) * 4;
      return { attention: stream + normed + tokens.whole * each };
    }
    case "latent_attention": {
      const { heads, queryRank, keyRank, headDim, ropeDim, valueDim } = layer;
      const narrow = tokens.cut * (queryRank + keyRank + ropeDim) * 2 * a;
      const [query, value] = [(heads / tp) * (headDim + ropeDim), (heads / tp) * valueDim];
      const wide = tokens.whole * ((again ? 0 : 2 * query + value) * a + value * a + (heads / tp) * 4);
      return { attention: stream + normed + narrow + wide };
    }
    case "mamba": {
      const { heads, headDim, groups, state, chunk } = layer;
      const inner = (heads * headDim) / tp;
      const channels = inner + (2 * groups * state) / tp;
      // Projected inputs, convolved channels, chunk states, the scan's output, the gated norm's output.
      const each = (inner + channels + heads / tp) * a + channels * a + ((inner * state) / chunk) * a
        + inner * a + (again ? 0 : inner * p);
      return { mamba: stream + normed + tokens.whole * each };
    }
    case "mlp": {
      const width = layer.width / tp;
      const each = width * (layer.gated ? 2 : 1) * a + (again ? 0 : width * p);
      return { mlp: stream + normed + tokens.whole * each };
    }
    case "moe": {
      const { experts, topk, gated, latent, shared } = layer;
      const rows = tokens.cut * topk * etp;
      const [width, input] = [layer.width / etp, latent ?? hidden];
      const wide = gated ? 2 : 1;
      // Scores and choices; tokens in latent space before and after.
      const router = stream + normed + tokens.cut * experts * 8
        + (latent === null ? 0 : 2 * tokens.cut * latent * a);
      const routed = rows * (input * p + width * wide * a + (again ? 0 : width * p) + 8);
      const each = (shared / tp) * wide * a + (again ? 0 : (shared / tp) * p);
      return { router, experts: routed, shared: shared === 0 ? 0 : tokens.whole * each };
    }
  }
}

const PART_OF = {
  attention: "attention", latent_attention: "attention", mamba: "mamba", mlp: "mlp",
} as const;

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
