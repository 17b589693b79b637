/**
 * Predicted time of a training step of a layout on many GPUs: products, attention and scans, memory-bound
 * kernels, exposed collectives, pipeline bubbles, gradient reduction, optimiser. Time is in seconds.
 */
import type { Efficiencies, Gpu, PlanPrecision } from "./hardware.ts";
import { peakOf } from "./hardware.ts";
import type { Layout, StepSizes } from "./layout.ts";
import { addShares, countEqual, layerShares, mixingFlops, mtpShares, productsOf } from "./model_shape.ts";
import type { ModelShape, Product, ProductRole, ShapeLayer } from "./model_shape.ts";
import { chunksOf, tokensOf } from "./memory.ts";
import type { Chunk, Recompute, Pipeline } from "./memory.ts";

/** What is planned beside the layout. */
export interface CostOptions {
  readonly gpu: Gpu;
  readonly efficiencies: Efficiencies;
  readonly precision: PlanPrecision;
  readonly recompute: Recompute;
  /** Parameters are gathered before use and their gradients scattered, in every micro-batch. */
  readonly fsdp: boolean;
  /** Experts lie across data-parallel replicas, as before folding: etp is tp, and ep steps over tp * cp. */
  readonly unfolded: boolean;
  /** The expert exchange of one micro-batch runs beside the computation of another. */
  readonly overlapExchange: boolean;
  /** Bytes of a gradient on its way. */
  readonly gradientBytes: number;
}

/** What the time of a layer goes to. */
const PARTS = ["products", "mixing", "memory", "tp", "cp", "ep"] as const;
export type CostPart = (typeof PARTS)[number];
type Cost = Record<CostPart, number>;

/** Exposed time of a step by what it goes to; the sum is the step. */
export interface StepCost extends Readonly<Cost> {
  /** Forward passes run a second time. */
  readonly recompute: number;
  /** Waiting for the slowest rank of the pipeline. */
  readonly imbalance: number;
  readonly bubble: number;
  /** Messages between pipeline stages. */
  readonly pp: number;
  /** Gradients and parameters among replicas. */
  readonly dp: number;
  readonly optimizer: number;
  readonly total: number;
}
export const STEP_PARTS = [
  ...PARTS, "recompute", "imbalance", "bubble", "pp", "dp", "optimizer",
] as const;

interface LayerCost {
  readonly forward: Cost;
  readonly backward: Cost;
  /** What the chosen recomputation runs again. */
  readonly again: number;
}

const none = (): Cost => ({ products: 0, mixing: 0, memory: 0, tp: 0, cp: 0, ep: 0 });
const sumOf = (cost: Cost): number => PARTS.reduce((sum, part) => sum + cost[part], 0);

/** Times of the layers of a model under a layout; equal layers are computed once. */
export interface LayerCosts {
  of(layer: ShapeLayer): LayerCost;
  readonly head: LayerCost;
  readonly embedding: LayerCost;
}

/** Times of all layers. They depend on tp, cp, ep, etp and the micro-batch, not on the pipeline. */
export function layerCosts(
  shape: ModelShape, layout: Layout, sizes: StepSizes, options: CostOptions,
): LayerCosts {
  const cached = new Map<ShapeLayer, LayerCost>();
  const of = (layer: ShapeLayer): LayerCost => {
    const known = cached.get(layer);
    if (known) return known;
    const cost = layerCost(shape.hidden, layer, layout, sizes, options);
    cached.set(layer, cost);
    return cost;
  };
  return {
    of, head: headCost(shape, layout, sizes, options, of),
    embedding: embeddingCost(shape, layout, sizes, options),
  };
}

/** Time of a product of [rows, in] and [out, in], `groups` of them side by side. */
export function productTime(
  rows: number, out: number, input: number, groups: number,
  { gpu, efficiencies: e, precision }: CostOptions, role: ProductRole = "linear", accumulate = false,
): number {
  const format = formatOf(role, precision);
  const peak = peakOf(gpu, format);
  const bits = format === "bf16" ? 16 : format === "nvfp4" ? 4 : 8;
  // Tiles of 128 x 256 outputs run in waves over the multiprocessors. A tile's start and end take as long as
  // some steps of k, the longer the faster the steps are.
  const tiles = groups * Math.ceil(rows / 128) * Math.ceil(out / 256);
  const start = e.tileStart * (peak / peakOf(gpu, "bf16"));
  const reached = (bits === 16 ? e.product : e.productLow) * (peak / gpu.multiprocessors);
  const computing = waves(tiles, gpu.multiprocessors) * ((2 * 128 * 256 * (input + start)) / reached);
  // Gradients of weights are added to f32 sums: one read and one write.
  const result = groups * rows * out * (accumulate ? 8 : 2);
  const moving = ((groups * (rows + out) * input * bits) / 8 + result) / (gpu.memoryRate * e.memory);
  return Math.max(computing, moving) + e.kernelGap;
}

function formatOf(role: ProductRole, precision: PlanPrecision): PlanPrecision {
  if (role === "high") return "bf16";
  if (precision !== "nvfp4" || role === "linear") return precision;
  return role === "attention" ? "bf16" : "mxfp8";
}

/** Waves of tiles: whole ones while they are few, a share of one where schedulers even them out. */
function waves(tiles: number, processors: number): number {
  const exact = tiles / processors;
  return exact <= 4 ? Math.ceil(exact) : exact + 0.5;
}

function layerCost(
  hidden: number, layer: ShapeLayer, layout: Layout, sizes: StepSizes, options: CostOptions,
): LayerCost {
  const { gpu, efficiencies: e, precision, recompute } = options;
  const { tp, ep, etp } = layout;
  const tokens = tokensOf(layout, sizes);
  const [forward, backward] = [none(), none()];
  let [moved, movedBack, kernels] = [0, 0, 6];
  // Norm and residual: 2-byte numbers read and written.
  moved += 10 * tokens.cut * hidden;
  movedBack += 12 * tokens.cut * hidden;
  const rows = layer.kind === "moe" ? tokens.cut * layer.topk * etp : 0;

  for (const product of productsOf(hidden, layer)) {
    const local = localProduct(product, layout);
    const isExpert = product.cut === "expert_out" || product.cut === "expert_in";
    const count = isExpert ? Math.max(1, product.count / ep) : 1;
    const each = isExpert ? rows / count : product.cut === "whole" ? tokens.cut : tokens.whole;
    forward.products += productTime(each, local.out, local.in, count, options, product.role);
    backward.products += productTime(each, local.in, local.out, count, options, product.role)
      + productTime(local.out, local.in, each, count, options, product.role, true);
    const format = formatOf(product.role, precision);
    if (format !== "bf16") {
      // Rows are read in 16 bits and written twice, along either axis; gradients likewise. Four bits are
      // rotated first, and read once more for the scale of the whole.
      const bytes = format === "nvfp4" ? 2 + 2 + 2 + 1 : 2 + 2;
      moved += each * count * local.in * bytes;
      movedBack += each * count * local.out * bytes;
      kernels += 2;
    }
  }

  const collect = (bytes: number) => collectiveTime(bytes, tp, 1, options) * e.tensorExposed;
  // Into a layer that is cut over tp, and out of it; the backward pass gathers the saved input once more.
  const around = tp === 1 ? 0 : collect(tokens.whole * hidden * 2);
  const mixing = mixingTime(layer, layout, sizes, options);
  forward.mixing = mixing.forward;
  backward.mixing = mixing.backward;
  switch (layer.kind) {
    case "attention": case "latent_attention": {
      const width = layer.kind === "attention" ? (layer.heads + layer.kvHeads) * layer.headDim
        : layer.heads * (2 * layer.headDim + 2 * layer.ropeDim + layer.valueDim) + layer.queryRank;
      moved += (4 * tokens.whole * width) / tp;
      movedBack += (4 * tokens.whole * width) / tp;
      kernels += layer.kind === "attention" ? 4 : 10;
      forward.tp += 2 * around;
      backward.tp += 3 * around;
      const cp = ringTime(layer, layout, sizes, options, mixing.forward);
      forward.cp += cp;
      backward.cp += 2 * cp;
      break;
    }
    case "mamba": {
      const inner = (layer.heads * layer.headDim) / tp;
      const channels = inner + (2 * layer.groups * layer.state) / tp;
      // Convolution, scan inputs and outputs, gated norm.
      moved += tokens.whole * (4 * channels + 4 * channels + 4 * inner + 6 * inner);
      movedBack += tokens.whole * (8 * channels + 8 * channels + 6 * inner + 10 * inner);
      kernels += 10;
      forward.tp += 2 * around;
      backward.tp += 3 * around;
      if (layout.cp > 1) {
        const bytes = 2 * tokens.whole * (2 * inner + channels + layer.heads / tp);
        const time = exchangeTime(bytes, layout.cp, tp, options);
        forward.cp += time;
        backward.cp += time;
      }
      break;
    }
    case "mlp": {
      const width = (tokens.whole * layer.width) / tp;
      moved += width * (layer.gated ? 6 : 4);
      movedBack += width * (layer.gated ? 10 : 6);
      forward.tp += 2 * around;
      backward.tp += 3 * around;
      break;
    }
    case "moe": {
      const input = layer.latent ?? hidden;
      const wide = layer.gated ? 2 : 1;
      const width = (rows * layer.width) / etp;
      // Scores, choices and positions; permutation out and back, by expert where a rank has several.
      const orders = ep > 1 && layer.experts / ep > 1 ? 2 : 1;
      moved += tokens.cut * layer.experts * 24 + 8 * rows * input * orders;
      movedBack += tokens.cut * layer.experts * 24 + 8 * rows * input * orders;
      moved += width * (layer.gated ? 6 : 4);
      movedBack += width * (layer.gated ? 10 : 6);
      kernels += 14;
      if (layer.shared > 0) {
        const shared = (tokens.whole * layer.shared) / tp;
        moved += shared * (wide + 1) * 2;
        movedBack += shared * (wide + 1) * 4;
        forward.tp += 2 * around;
        backward.tp += 3 * around;
      }
      const exchange = expertExchange(layer.topk, tokens.cut * input * 2, layout, options);
      forward.ep += 2 * exchange.direct;
      backward.ep += 2 * exchange.direct;
      // Rows are gathered over etp before the experts and summed after them.
      forward.ep += 2 * exchange.tensor;
      backward.ep += 2 * exchange.tensor;
    }
  }
  const rate = gpu.memoryRate * e.memory;
  forward.memory += moved / rate + kernels * e.kernelGap;
  backward.memory += movedBack / rate + 1.5 * kernels * e.kernelGap;
  return { forward, backward, again: againTime(hidden, layer, layout, tokens, forward, recompute, options) };
}

/** What recomputation runs again: the whole forward pass, or norm, activation and narrow projections. */
function againTime(
  hidden: number, layer: ShapeLayer, layout: Layout, tokens: { whole: number; cut: number }, forward: Cost,
  recompute: Recompute, options: CostOptions,
): number {
  if (recompute === "none") return 0;
  if (recompute === "full" || (recompute === "moe" && layer.kind === "moe")) return sumOf(forward);
  const { gpu, efficiencies: e } = options;
  const norm = (4 * tokens.cut * hidden) / (gpu.memoryRate * e.memory) + e.kernelGap;
  if (layer.kind !== "latent_attention") return norm + 0.3 * forward.memory;
  const wide = productsOf(hidden, layer).filter(({ cut }) => cut === "out");
  return norm + wide.reduce((sum, product) => {
    const local = localProduct(product, layout);
    return sum + productTime(tokens.whole, local.out, local.in, 1, options);
  }, 0);
}

function localProduct({ out, in: input, cut }: Product, { tp, etp }: Layout) {
  return {
    out: cut === "out" ? out / tp : cut === "expert_out" ? out / etp : out,
    in: cut === "in" ? input / tp : cut === "expert_in" ? input / etp : input,
  };
}

/** Attention and scans. Fused attention runs at its measured rate for the length of the sequence. */
function mixingTime(
  layer: ShapeLayer, layout: Layout, sizes: StepSizes, { gpu, efficiencies: e }: CostOptions,
): { forward: number; backward: number } {
  const { tp } = layout;
  const { whole: tokens } = tokensOf(layout, sizes);
  if (layer.kind === "attention" || layer.kind === "latent_attention") {
    const flops = (mixingFlops(layer, sizes.seqlen) * tokens) / tp;
    // Under cp a kernel sees the keys of one rank at a time.
    const at = Math.min(1, Math.max(0, Math.log(sizes.seqlen / layout.cp / 4096) / Math.log(4)));
    const rate = ([short, long]: readonly [number, number]) => short + at * (long - short);
    // The backward pass has 2.5 times the products, and its measured rate counts them.
    return {
      forward: flops / rate(gpu.attention.forward), backward: (2.5 * flops) / rate(gpu.attention.backward),
    };
  }
  if (layer.kind !== "mamba") return { forward: 0, backward: 0 };
  const { heads, headDim, groups, state, chunk } = layer;
  const flops = tokens * (2 * groups * chunk * state + heads * headDim * (2 * chunk + 4 * state)) / tp;
  const forward = flops / (peakOf(gpu, "bf16") * e.scan);
  return { forward, backward: 2.5 * forward };
}

/** Final norm, head, loss and prediction block. */
function headCost(
  shape: ModelShape, layout: Layout, sizes: StepSizes, options: CostOptions, of: LayerCosts["of"],
): LayerCost {
  const { gpu, efficiencies: e } = options;
  const tokens = tokensOf(layout, sizes);
  const [forward, backward] = [none(), none()];
  const passes = 1 + shape.mtpDepths;
  const rows = shape.vocab / layout.tp;
  const rate = gpu.memoryRate * e.memory;
  for (let pass = 0; pass < passes; pass++) {
    forward.products += productTime(tokens.whole, rows, shape.hidden, 1, options, "high");
    backward.products += productTime(tokens.whole, shape.hidden, rows, 1, options, "high")
      + productTime(rows, shape.hidden, tokens.whole, 1, options, "high", true);
    // Logits are written, read for their maximum and sum, and read and written as gradients.
    forward.memory += (12 * tokens.whole * rows) / rate;
    backward.memory += (8 * tokens.whole * rows) / rate;
    const gather = collectiveTime(tokens.whole * shape.hidden * 2, layout.tp, 1, options) * e.tensorExposed;
    forward.tp += gather;
    backward.tp += 2 * gather;
  }
  for (const layer of shape.mtp) {
    for (const part of PARTS) {
      forward[part] += shape.mtpDepths * of(layer).forward[part];
      backward[part] += shape.mtpDepths * of(layer).backward[part];
    }
  }
  const join = productTime(tokens.cut, shape.hidden, 2 * shape.hidden, 1, options, "high");
  forward.products += shape.mtpDepths * join;
  backward.products += 2 * shape.mtpDepths * join;
  return { forward, backward, again: 0 };
}

/** The table's rows are read and their gradients added. */
function embeddingCost(
  shape: ModelShape, layout: Layout, sizes: StepSizes, options: CostOptions,
): LayerCost {
  const { gpu, efficiencies: e } = options;
  const { whole } = tokensOf(layout, sizes);
  const [forward, backward] = [none(), none()];
  forward.memory = (4 * whole * shape.hidden) / (gpu.memoryRate * e.memory) + e.kernelGap;
  backward.memory = 3 * forward.memory;
  forward.tp = collectiveTime(whole * shape.hidden * 2, layout.tp, 1, options) * e.tensorExposed;
  backward.tp = forward.tp;
  return { forward, backward, again: 0 };
}

/** How many ranks of a group lie in one domain, where neighbours in the group are `stride` ranks apart. */
export function ranksInDomain(size: number, stride: number, domain: number): number {
  return Math.max(1, Math.min(size, Math.floor(domain / stride)));
}

/**
 * Time of an all-gather or reduce-scatter whose whole is `bytes`: each rank moves all but its own part.
 * Between domains the ranks of a group that share one use their network adapters together.
 */
export function collectiveTime(
  bytes: number, size: number, stride: number, { gpu, efficiencies: e }: CostOptions,
): number {
  if (size === 1) return 0;
  const local = ranksInDomain(size, stride, gpu.domain);
  const inside = gpu.inside * e.inside;
  const alone = local === size;
  const rate = alone ? inside : Math.min(inside, local * gpu.between * e.between);
  const start = alone ? e.startInside : e.startBetween * Math.log2(size / local + 1);
  return (bytes * (size - 1)) / size / rate + start;
}

/** Time of an all-to-all in which each rank has `bytes`, an equal share for every other rank. */
function exchangeTime(
  bytes: number, size: number, stride: number, { gpu, efficiencies: e }: CostOptions,
): number {
  if (size === 1) return 0;
  const local = ranksInDomain(size, stride, gpu.domain);
  const inside = (bytes * (local - 1)) / size / (gpu.inside * e.insideExchange);
  const between = (bytes * (size - local)) / size / (gpu.between * e.between);
  return Math.max(inside, between) + (local === size ? e.startInside : e.startBetween);
}

/**
 * One way of the expert exchange: tokens to their experts, or back. The flex dispatcher sends a token once to
 * a domain that has several of its experts, and once to a rank; the others send it once per expert.
 * @param bytes of a rank's tokens, one copy each
 */
function expertExchange(
  topk: number, bytes: number, layout: Layout, options: CostOptions,
): { direct: number; tensor: number } {
  const { gpu, efficiencies: e, overlapExchange } = options;
  const { ep, etp } = layout;
  const exposed = overlapExchange ? e.exchangeExposed : 1;
  const stride = expertStride(layout, options);
  const local = ranksInDomain(ep, stride, gpu.domain);
  const domains = ep / local;
  const copies = (places: number): number =>
    layout.dispatcher === "flex" ? places * (1 - (1 - 1 / places) ** topk) : topk;
  let direct = 0;
  if (ep > 1) {
    const inside = (bytes * copies(ep) * (local - 1)) / (ep * gpu.inside * e.insideExchange);
    const between = (bytes * copies(domains) * (domains - 1)) / domains / (gpu.between * e.between);
    direct = Math.max(inside, domains > 1 ? between : 0) + (domains > 1 ? e.startBetween : e.startInside);
  }
  const tensor = collectiveTime(bytes * topk * etp, etp, 1, options);
  return { direct: direct * exposed, tensor };
}

/** Ranks from one expert rank to the next. Without folding the experts are spread over dp, then over cp. */
function expertStride({ tp, cp, dp, ep, etp }: Layout, { unfolded }: CostOptions): number {
  if (!unfolded) return etp;
  return ep <= dp ? tp * cp : (tp * cp * dp) / ep;
}

/** Exposed time of passing keys and values around under cp: what the attention of a step does not hide. */
function ringTime(
  layer: ShapeLayer, layout: Layout, sizes: StepSizes, options: CostOptions, attention: number,
): number {
  const { tp, cp } = layout;
  if (cp === 1) return 0;
  const { gpu, efficiencies: e } = options;
  const tokens = (sizes.batch * sizes.seqlen) / cp;
  const width = layer.kind === "attention" ? 2 * Math.max(1, layer.kvHeads / tp) * layer.headDim
    : layer.kind === "latent_attention"
      ? (layer.heads / tp) * (layer.headDim + layer.ropeDim + layer.valueDim) : 0;
  const local = ranksInDomain(cp, tp, gpu.domain);
  const rate = local === cp ? gpu.inside * e.inside : gpu.between * e.between;
  const step = (tokens * width * 2) / rate + e.startInside;
  // What a step adds to the result is read, and the f32 sums read and written.
  const heads = layer.kind === "attention" ? layer.heads * layer.headDim
    : layer.kind === "latent_attention" ? layer.heads * layer.valueDim : 0;
  const merge = (10 * tokens * heads) / tp / (gpu.memoryRate * e.memory) + 3 * e.kernelGap;
  return (cp - 1) * (Math.max(0, step - attention / cp) + merge);
}

/**
 * Cuts units of layers into the chunks of a pipeline so that its slowest rank is fast; null when there are
 * fewer units than chunks. Rank p has the chunks p, p + P, ...; embedding and head weigh on the ends.
 * @returns the number of units in each chunk
 */
export function cutUnits(
  costs: readonly number[], pp: number, vpp: number, first: number, last: number,
): number[] | null {
  const count = pp * vpp;
  if (costs.length < count) return null;
  if (vpp === 1) return cutPlain(costs, pp, first, last);
  const mean = costs.reduce((sum, cost) => sum + cost, 0) / costs.length;
  const sizes: number[] = Array.from({ length: count }, () => 1);
  const loads = Array.from({ length: pp }, (_, p) =>
    vpp * mean + (p === 0 ? first : 0) + (p === pp - 1 ? last : 0));
  for (let left = costs.length - count; left > 0; left--) {
    const p = loads.indexOf(Math.min(...loads));
    let chunk = p;
    for (let i = p; i < count; i += pp) if (sizes[i]! < sizes[chunk]!) chunk = i;
    sizes[chunk]!++;
    loads[p]! += mean;
  }
  return improve(costs, sizes, pp, first, last);
}

/** Moves units over the borders of the slowest rank's chunks as long as that makes it faster. */
function improve(
  costs: readonly number[], start: readonly number[], pp: number, first: number, last: number,
): number[] {
  const sizes = [...start];
  const loads: number[] = Array.from({ length: pp }, () => 0);
  loads[0]! += first;
  loads[pp - 1]! += last;
  // Where each chunk begins, and one past the last.
  const begins = [0];
  sizes.forEach((size, i) => {
    const begin = begins[i]!;
    for (let at = begin; at < begin + size; at++) loads[i % pp]! += costs[at]!;
    begins.push(begin + size);
  });
  for (let round = 0; round < 50; round++) {
    const worst = Math.max(...loads);
    const slow = loads.indexOf(worst);
    let best = { load: worst * (1 - 1e-9), move: (): void => {} };
    for (let i = slow; i < sizes.length; i += pp) {
      if (sizes[i] === 1) continue;
      for (const [other, unit] of [[i - 1, begins[i]!], [i + 1, begins[i + 1]! - 1]] as const) {
        if (other < 0 || other >= sizes.length || other % pp === slow) continue;
        const cost = costs[unit]!;
        const load = Math.max(worst - cost, loads[other % pp]! + cost);
        if (load >= best.load) continue;
        best = {
          load, move: () => {
            sizes[i]!--;
            sizes[other]!++;
            begins[Math.max(i, other)]! += other < i ? 1 : -1;
            loads[slow]! -= cost;
            loads[other % pp]! += cost;
          },
        };
      }
    }
    if (best.load >= worst * (1 - 1e-9)) break;
    best.move();
  }
  return sizes;
}

/**
 * One chunk for each rank: the smallest limit that all can keep, the later ranks filled up to it. A search
 * cuts thousands of pipelines; `partition` of stages.ts, which evens out the others too, takes too long.
 */
function cutPlain(costs: readonly number[], pp: number, first: number, last: number): number[] {
  const fill = (limit: number): number[] | null => {
    const sizes: number[] = [];
    let at = costs.length;
    for (let p = pp - 1; p >= 0; p--) {
      let sum = (p === 0 ? first : 0) + (p === pp - 1 ? last : 0);
      let size = 0;
      // Every earlier rank needs a unit of its own; the first one takes what is left.
      while (at > p && (size === 0 || p === 0 || sum + costs[at - 1]! <= limit)) {
        sum += costs[--at]!;
        size++;
      }
      if (sum > limit * (1 + 1e-9)) return null;
      sizes.unshift(size);
    }
    return sizes;
  };
  let [low, high] = [0, first + last + costs.reduce((sum, cost) => sum + cost, 0)];
  for (let i = 0; i < 30; i++) {
    const middle = (low + high) / 2;
    if (fill(middle)) high = middle;
    else low = middle;
  }
  return fill(high)!;
}

/** The stages of a layout, cut so that chunks take about the same time. */
export function balancedChunks(shape: ModelShape, layout: Layout, costs: LayerCosts): Pipeline | null {
  const time = ({ forward, backward, again }: LayerCost) => sumOf(forward) + sumOf(backward) + again;
  const times = new Map<ShapeLayer, number>();
  for (const layer of shape.layers) if (!times.has(layer)) times.set(layer, time(costs.of(layer)));
  const units = Array.from({ length: Math.ceil(shape.layers.length / shape.unit) }, (_, i) =>
    shape.layers.slice(i * shape.unit, (i + 1) * shape.unit)
      .reduce((sum, layer) => sum + times.get(layer)!, 0));
  const sizes = cutUnits(units, layout.pp, layout.vpp, time(costs.embedding), time(costs.head));
  return sizes && chunksOf(shape, layout.pp, sizes);
}

/** Predicted step of a layout. */
export function stepCost(
  shape: ModelShape, layout: Layout, sizes: StepSizes, options: CostOptions, costs: LayerCosts,
  stages: Pipeline,
): StepCost {
  const { gpu, efficiencies: e } = options;
  const { tp, cp, dp, pp, ep, etp, vpp } = layout;
  const micros = sizes.micro_batches;
  const ranks = stages.map((chunks) => rankCost(chunks, costs));
  const times = ranks.map(({ cost, again }) => sumOf(cost) + again);
  const slowest = times.indexOf(Math.max(...times));
  const mean = times.reduce((sum, time) => sum + time, 0) / times.length;
  const { cost, again } = ranks[slowest]!;
  const scale = mean / times[slowest]!;

  // A stage's output goes on and its gradient comes back, once for every chunk.
  const { cut } = tokensOf(layout, sizes);
  const message = (cut * shape.hidden * 2) / (gpu.between * e.between) + e.startBetween;
  const messages = pp === 1 ? 0 : 2 * vpp * message * (vpp > 1 ? e.messageExposed : 1);

  const shares = addShares(stages[slowest]!.flatMap(({ layers, embedding, head }) => [
    ...layers.map((layer) => layerShares(shape.hidden, layer)), ...(head ? [mtpShares(shape)] : []),
    { cut: (Number(embedding) + Number(head)) * shape.vocab * shape.hidden, whole: 0, expert: 0 },
  ]));
  const dense = shares.cut / tp + shares.whole;
  const expert = shares.expert / (ep * etp);
  const stage = tp * cp * dp;
  const expertRanks = stage / (ep * etp);
  const among = (bytes: number) => collectiveTime(dense * bytes, dp * cp, tp, options)
    + collectiveTime(expert * bytes, expertRanks, options.unfolded ? tp * cp * ep : ep * etp, options);
  const [gather, scatter] = [among(2), among(options.gradientBytes)];
  const perMicro = times[slowest]!;
  const moving = options.fsdp ? micros * (2 * gather + scatter) : gather + scatter;
  const dpTime = Math.max(0, moving - e.dataOverlap * perMicro * (options.fsdp ? micros : 1));

  const owned = dense / (dp * cp) + expert / expertRanks;
  // Masters, both moments and gradients are read, all but the gradients written, and 16-bit weights too.
  const optimizer = (owned * 30) / (gpu.memoryRate * e.memory)
    + 2 * e.startBetween * Math.log2(dp * cp * pp + 1);
  const bubble = ((pp - 1) / vpp) * (perMicro + messages);
  const step: Record<(typeof STEP_PARTS)[number], number> = {
    ...none(), recompute: micros * again * scale, imbalance: micros * (perMicro - mean), bubble,
    pp: micros * messages, dp: dpTime, optimizer,
  };
  for (const part of PARTS) step[part] = micros * cost[part] * scale;
  return { ...step, total: STEP_PARTS.reduce((sum, part) => sum + step[part], 0) };
}

function rankCost(chunks: readonly Chunk[], costs: LayerCosts): { cost: Cost; again: number } {
  const cost = none();
  let again = 0;
  const add = (layer: LayerCost, times: number): void => {
    for (const part of PARTS) cost[part] += times * (layer.forward[part] + layer.backward[part]);
    again += times * layer.again;
  };
  const counts = countEqual(chunks.flatMap(({ layers }) => layers));
  for (const [layer, count] of counts) add(costs.of(layer), count);
  if (chunks.some(({ embedding }) => embedding)) add(costs.embedding, 1);
  if (chunks.some(({ head }) => head)) add(costs.head, 1);
  return { cost, again };
}
