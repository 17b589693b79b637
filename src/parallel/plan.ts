/** Searches the layouts of a model on many GPUs for the ones with the fastest predicted step that fit. */
import { UsageError } from "../tensor/errors.ts";
import { balancedChunks, layerCosts, stepCost, STEP_PARTS } from "./cost.ts";
import type { CostOptions, LayerCosts, StepCost } from "./cost.ts";
import { EFFICIENCIES, peakOf } from "./hardware.ts";
import type { Efficiencies, Gpu, PlanPrecision } from "./hardware.ts";
import type { Layout, StepSizes } from "./layout.ts";
import { BF16_TRAINING, RECOMPUTES, predictMemory } from "./memory.ts";
import type { Pipeline, RankMemory, Recompute, Widths } from "./memory.ts";
import { addShares, layerShares, mtpShares, shapeParameters, trainingFlops } from "./model_shape.ts";
import type { ModelShape, ParameterShares } from "./model_shape.ts";
import { formatFlexible } from "./stages.ts";

export interface PlanRequest {
  readonly shape: ModelShape;
  readonly gpus: number;
  readonly gpu: Gpu;
  readonly precision: PlanPrecision;
  readonly seqlen: number;
  /** Sequences in a step. */
  readonly globalBatch: number;
  /** What the search must keep; the rest is free. */
  readonly fixed?: {
    readonly tp?: number; readonly cp?: number; readonly pp?: number; readonly ep?: number;
    readonly etp?: number; readonly vpp?: number; readonly microBatch?: number;
    /** Also one whose memory does not fit by prediction: a run that was measured did fit. */
    readonly recompute?: Recompute;
  };
  /** Experts across data-parallel replicas, as before folding: etp is tp, ep divides dp. Default: folded. */
  readonly unfolded?: boolean;
  /** FSDP alone, or no FSDP; default: whichever is faster. */
  readonly fsdp?: boolean;
  /** Overlap the expert exchange with computation where the schedule allows; default true. */
  readonly overlapExchange?: boolean;
  /** Send a token once to a domain; default true. */
  readonly deduplicate?: boolean;
  readonly efficiencies?: Efficiencies;
  /** How many plans to keep; default 10. */
  readonly top?: number;
}

export interface Plan {
  readonly layout: Layout;
  readonly sizes: StepSizes;
  readonly recompute: Recompute;
  readonly fsdp: boolean;
  readonly overlapExchange: boolean;
  readonly step: StepCost;
  readonly memory: RankMemory;
  readonly pipeline: Pipeline;
  /** TFLOPS per GPU, counted as `trainingFlops` does. */
  readonly tflops: number;
  /** Of the dense peak of the precision. */
  readonly mfu: number;
  /** Per second and GPU. */
  readonly tokens: number;
}

export interface PlanResult {
  /** The fastest first; of plans that differ in interleaving and micro-batch alone, only the fastest. */
  readonly plans: readonly Plan[];
  /** Combinations of layout, micro-batch and recomputation that were looked at. */
  readonly searched: number;
  /** Of those, how many each rule ruled out. */
  readonly refused: ReadonlyMap<string, number>;
  /** The smallest total of a rank that did not fit; null when none was too large. */
  readonly smallest: number | null;
}

/** Share of a GPU's memory that a plan may take: drivers, communicators and allocators take the rest. */
export const USABLE_MEMORY = 0.92;

/** Why a layout is out, as the summary counts it. */
const RULES = {
  grid: "experts do not fill the grid", widths: "widths or heads do not divide",
  batch: "micro-batches do not fill the replicas", pipeline: "pipeline too deep for layers or micro-batches",
  unfolded: "experts do not lie within dp * cp", memory: "more memory than the GPU has",
} as const;

/**
 * Searches all layouts of powers of two and of divisors.
 * @throws UsageError when no layout fills the GPUs, or none fits their memory: one sentence that says why
 */
export function searchPlans(request: PlanRequest): PlanResult {
  const { shape, gpus, gpu, globalBatch, seqlen, precision, fixed = {}, unfolded = false } = request;
  peakOf(gpu, precision);
  const refused = new Map<string, number>();
  let searched = 0;
  let smallest: number | null = null;
  const refuse = (rule: keyof typeof RULES, count = 1): void => {
    refused.set(RULES[rule], (refused.get(RULES[rule]) ?? 0) + count);
  };
  const plans: Plan[] = [];
  const whole = wholeShares(shape);
  const least = (layout: Layout) => leastState(whole, layout, planWidths(precision), request.fsdp ?? true);
  const cache = new Map<string, LayerCosts>();
  const options = optionsOf(request);
  const expertCount = Math.max(...allLayers(shape).map((layer) => layer.kind === "moe" ? layer.experts : 1));
  const units = shape.layers.length / shape.unit;
  const pick = (value: number | undefined, list: readonly number[]) => value === undefined ? list : [value];

  for (const tp of pick(fixed.tp, powers(Math.min(16, gpu.domain, gpus)))) {
    for (const cp of pick(fixed.cp, powers(Math.max(1, Math.min(gpus / tp, seqlen / 4096))))) {
      for (const pp of pick(fixed.pp, divisors(gpus).filter((pp) => pp <= Math.min(units, 64)))) {
        if (gpus % (tp * cp * pp) !== 0) { searched++; refuse("grid"); continue; }
        const dp = gpus / (tp * cp * pp);
        for (const ep of pick(fixed.ep, divisors(expertCount))) {
          for (const etp of unfolded ? [tp] : pick(fixed.etp, tp > 1 && expertCount > 1 ? [1, tp] : [1])) {
            const edp = (tp * cp * dp) / (etp * ep);
            if (!Number.isInteger(edp)) { searched++; refuse("grid"); continue; }
            if (unfolded && (dp * cp) % ep !== 0) { searched++; refuse("unfolded"); continue; }
            if (!widthsDivide(shape, tp, cp, ep, etp)) { searched++; refuse("widths"); continue; }
            for (const vpp of pick(fixed.vpp, pp === 1 ? [1] : interleavings(units / pp))) {
              const layout: Layout = {
                tp, cp, dp, pp, ep, etp, edp, vpp, micro_batch_group: pp, sp: tp > 1, cp_kind: "ring",
                dispatcher: ep > 1 && (request.deduplicate ?? true) ? "flex" : "alltoall",
                overlap: false, algorithm: "direct", expert_budget: null, stages: null,
              };
              for (const batch of pick(fixed.microBatch, [1, 2, 4, 8])) look(layout, batch);
            }
          }
        }
      }
    }
  }

  function look(layout: Layout, batch: number): void {
    const { dp, pp, vpp } = layout;
    const micros = globalBatch / (dp * batch);
    if (!Number.isInteger(micros)) { searched++; refuse("batch"); return; }
    const uneven = vpp > 1 && (micros < pp || (micros % pp !== 0 && micros % pp < pp));
    if (pp * vpp > units || uneven) { searched++; refuse("pipeline"); return; }
    if (fixed.recompute === undefined && least(layout) > USABLE_MEMORY * gpu.memory) {
      searched += RECOMPUTES.length;
      refuse("memory", RECOMPUTES.length);
      smallest = Math.min(smallest ?? Infinity, least(layout));
      return;
    }
    const sizes: StepSizes = { batch, seqlen, micro_batches: micros };
    const schemes = request.fsdp === undefined && pp === 1 ? [false, true] : [request.fsdp ?? false];
    for (const fsdp of schemes) {
      for (const recompute of fixed.recompute ? [fixed.recompute] : RECOMPUTES) {
        searched++;
        const plan = planOf(request, options, layout, sizes, recompute, fsdp, cache);
        if (typeof plan === "number") {
          refuse("memory");
          smallest = Math.min(smallest ?? Infinity, plan);
          continue;
        }
        plans.push(plan);
        // What recomputes more is slower where less fits.
        break;
      }
    }
  }

  const kept = fastest(plans).slice(0, request.top ?? 10);
  if (kept.length === 0) throw new UsageError(whyNone(request, refused, smallest));
  return { plans: kept, searched, refused, smallest };
}

function fastest(plans: readonly Plan[]): Plan[] {
  const best = new Map<string, Plan>();
  for (const plan of plans) {
    const { tp, cp, pp, ep, etp } = plan.layout;
    const key = [tp, cp, pp, ep, etp, plan.fsdp].join();
    const known = best.get(key);
    if (!known || plan.step.total < known.step.total) best.set(key, plan);
  }
  return [...best.values()].toSorted((a, b) => a.step.total - b.step.total);
}

function optionsOf(request: PlanRequest): Omit<CostOptions, "recompute" | "fsdp" | "overlapExchange"> {
  return {
    gpu: request.gpu, efficiencies: request.efficiencies ?? EFFICIENCIES, precision: request.precision,
    unfolded: request.unfolded ?? false, gradientBytes: 4,
  };
}

/** The plan of one layout; the bytes of its most loaded rank when they are too many. */
function planOf(
  request: PlanRequest, base: ReturnType<typeof optionsOf>, layout: Layout, sizes: StepSizes,
  recompute: Recompute, fsdp: boolean, cache: Map<string, LayerCosts>,
): Plan | number {
  const { shape, gpu, precision, seqlen, gpus, globalBatch } = request;
  const recomputesExperts = recompute === "full" || recompute === "moe";
  const overlapExchange = (request.overlapExchange ?? true) && layout.ep > 1 && !recomputesExperts
    && (layout.pp === 1 || layout.vpp > 1) && !fsdp;
  const planned: Layout = { ...layout, overlap: overlapExchange };
  const options: CostOptions = { ...base, recompute, fsdp, overlapExchange };
  const { tp, cp, ep, etp, dispatcher } = layout;
  const key = [tp, cp, ep, etp, dispatcher, sizes.batch, recompute, overlapExchange].join();
  const costs = cache.get(key) ?? layerCosts(shape, layout, sizes, options);
  cache.set(key, costs);
  const stages = balancedChunks(shape, layout, costs);
  if (!stages) return Infinity;
  const widths = planWidths(precision);
  const memory = predictMemory(shape, planned, sizes, {
    widths, recompute, sharding: fsdp ? "all" : "optimizer", stages,
  });
  const fits = memory.total <= USABLE_MEMORY * gpu.memory;
  if (!fits && request.fixed?.recompute === undefined) return memory.total;
  const step = stepCost(shape, layout, sizes, options, costs, stages);
  const perGpu = (globalBatch * seqlen) / gpus / step.total;
  const rate = trainingFlops(shape, seqlen) * perGpu;
  return {
    layout: planned, sizes, recompute, fsdp, overlapExchange, step, memory, pipeline: stages,
    tflops: rate / 1e12,
    mfu: rate / peakOf(gpu, precision), tokens: perGpu,
  };
}

/**
 * The stages of a plan as a layout string, Et*3|(tt|)*29m|L, where t is a layer or a transformer's block.
 * Stage i is chunk floor(i / P) of rank i mod P.
 */
export function stageText({ pipeline }: Plan, shape: ModelShape): string {
  const [pp, vpp] = [pipeline.length, pipeline[0]!.length];
  return formatFlexible(Array.from({ length: pp * vpp }, (_, i) => {
    const { layers, embedding, head } = pipeline[i % pp]![Math.floor(i / pp)]!;
    const end = head ? `${"m".repeat(shape.mtpDepths)}L` : "";
    return `${embedding ? "E" : ""}${"t".repeat(layers.length / shape.unit)}${end}`;
  }));
}

/**
 * Widths of the state of a run in a precision. Products in fewer bits keep their inputs in 8, and such runs
 * keep their moments in bf16, as DeepSeek-V3's did.
 */
export function planWidths(precision: PlanPrecision): Widths {
  if (precision === "bf16") return BF16_TRAINING;
  // Quantised copies along both axes, the scales of blocks of 16 with the 4-bit ones.
  const quantised = precision === "nvfp4" ? 2 * (0.5 + 1 / 16) : 2;
  return { ...BF16_TRAINING, productInput: 1, moments: 4, quantised };
}

/** All parameters by where they lie. */
function wholeShares(shape: ModelShape): ParameterShares {
  return addShares([
    ...shape.layers.map((layer) => layerShares(shape.hidden, layer)), mtpShares(shape),
    { cut: 2 * shape.vocab * shape.hidden, whole: 0, expert: 0 },
  ]);
}

/** Bytes of parameters, gradients and optimiser state on a mean rank: no rank's memory is all below it. */
function leastState(
  { cut, whole, expert }: ParameterShares, { tp, cp, dp, pp, ep, etp, edp }: Layout, widths: Widths,
  fsdp: boolean,
): number {
  const held = widths.parameter + widths.quantised + widths.gradient;
  const owned = widths.master + widths.moments;
  const shared = fsdp && pp === 1;
  const bytes = (ranks: number) => (shared ? held / ranks : held) + owned / ranks;
  return ((cut / tp + whole) * bytes(dp * cp) + (expert / (ep * etp)) * bytes(edp)) / pp;
}

function allLayers(shape: ModelShape) {
  return [...shape.layers, ...shape.mtp];
}

/** Whether heads, groups, widths, experts and the vocabulary divide. */
function widthsDivide(shape: ModelShape, tp: number, cp: number, ep: number, etp: number): boolean {
  const each = (a: number, b: number) => a % b === 0 || b % a === 0;
  if (shape.vocab % tp !== 0) return false;
  return allLayers(shape).every((layer) => {
    switch (layer.kind) {
      case "attention":
        return layer.heads % tp === 0 && each(layer.kvHeads, tp);
      case "latent_attention":
        return layer.heads % tp === 0;
      case "mamba":
        return layer.heads % (tp * cp) === 0 && layer.groups % tp === 0 && each(layer.groups / tp, cp);
      case "mlp":
        return layer.width % tp === 0;
      case "moe":
        return layer.experts % ep === 0 && layer.width % etp === 0 && layer.shared % tp === 0;
    }
  });
}

/** 1, 2, 4, ... up to `most`. */
function powers(most: number): number[] {
  const list = [1];
  while (list.at(-1)! * 2 <= most) list.push(list.at(-1)! * 2);
  return list;
}

function divisors(n: number): number[] {
  return Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0);
}

/** Numbers of chunks for a rank of so many units: powers of two to 8, their divisors, one for each. */
function interleavings(units: number): number[] {
  const list = [1, 2, 3, 4, 5, 6, 7, 8, Math.floor(units)];
  const even = (vpp: number) => [1, 2, 4, 8].includes(vpp) || Math.floor(units) % vpp === 0;
  return [...new Set(list)].filter((vpp) => vpp <= units && even(vpp));
}

function whyNone(
  { shape, gpus, gpu, globalBatch }: PlanRequest, refused: ReadonlyMap<string, number>,
  smallest: number | null,
): string {
  const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
  const size = `${(shapeParameters(shape) / 1e9).toFixed(1)}B parameters`;
  if (smallest !== null && Number.isFinite(smallest)) {
    return `No layout of ${shape.name} (${size}) fits ${gpus} x ${gpu.name}: the smallest needs `
      + `at least ${gigabytes(smallest)} on a GPU, of which ${gigabytes(USABLE_MEMORY * gpu.memory)} are `
      + "usable.";
  }
  const [most] = [...refused].toSorted((a, b) => b[1] - a[1]);
  return `No layout of ${shape.name} (${size}) fills ${gpus} x ${gpu.name} with ${globalBatch} sequences `
    + `a step: most often, ${most?.[0] ?? "there is nothing to choose from"}.`;
}

/** What another plan spends more on than the best, the largest first, as shares of the best's step. */
export function losesBy(plan: Plan, best: Plan): { part: (typeof STEP_PARTS)[number]; share: number }[] {
  return STEP_PARTS.map((part) => ({ part, share: (plan.step[part] - best.step[part]) / best.step.total }))
    .filter(({ share }) => share > 0.0005).toSorted((a, b) => b.share - a.share);
}
