/**
 * Models and training rates that others have published, for the planner to be compared with.
 *
 * Shapes are those of the models' own config.json files on their publishers' pages unless said otherwise.
 */
import { preset, presetNames } from "../models/presets.ts";
import type { PlanPrecision } from "./hardware.ts";
import type { Recompute } from "./memory.ts";
import { shapeOf } from "./model_shape.ts";
import type { ModelShape, ShapeLayer } from "./model_shape.ts";

/** Blocks of attention and an MLP or a mixture of experts, `count` of them. */
function blocks(mixer: ShapeLayer, mlp: ShapeLayer, count: number): ShapeLayer[] {
  return Array.from({ length: count }, () => [mixer, mlp]).flat();
}

const attention = (heads: number, kvHeads: number, headDim = 128): ShapeLayer =>
  ({ kind: "attention", heads, kvHeads, headDim });
const experts = (count: number, topk: number, width: number, shared = 0): ShapeLayer =>
  ({ kind: "moe", experts: count, topk, width, gated: true, latent: null, shared });

const transformer = (
  name: string, hidden: number, vocab: number, layers: readonly ShapeLayer[], mtp: readonly ShapeLayer[] = [],
): ModelShape => ({
  name, hidden, vocab, layers, unit: 2, mtp, mtpDepths: mtp.length > 0 ? 1 : 0,
});

const LATENT: ShapeLayer = {
  kind: "latent_attention", heads: 128, queryRank: 1536, keyRank: 512, headDim: 128, ropeDim: 64,
  valueDim: 128,
};
const DEEPSEEK_EXPERTS = experts(256, 8, 2048, 2048);

const SHAPES: readonly ModelShape[] = [
  transformer("mixtral-8x22b", 6144, 32768, blocks(attention(48, 8), experts(8, 2, 16384), 56)),
  // The folding paper, section 4.1: 64 experts of an eighth of the width, of which 8 are met.
  transformer("mixtral-8x22b-g8t8", 6144, 32768, blocks(attention(48, 8), experts(64, 8, 2048), 56)),
  // The folding paper: Llama 3 70B upcycled to 8 experts. That 2 are met and that all layers have experts is
  // not stated there: taken from Mixtral.
  transformer("llama3-8x70b", 8192, 128256, blocks(attention(64, 8), experts(8, 2, 28672), 80)),
  transformer("qwen2-57b-a14b", 3584, 151936, blocks(attention(28, 4), experts(64, 8, 2560, 20480), 28)),
  transformer("qwen3-30b-a3b", 2048, 151936, blocks(attention(32, 4), experts(128, 8, 768), 48)),
  transformer("qwen3-235b-a22b", 4096, 151936, blocks(attention(64, 4), experts(128, 8, 1536), 94)),
  transformer("deepseek-v3", 7168, 129280, [
    ...blocks(LATENT, { kind: "mlp", width: 18432, gated: true }, 3),
    ...blocks(LATENT, DEEPSEEK_EXPERTS, 58),
  ], [LATENT, DEEPSEEK_EXPERTS]),
];

/** Short names for presets of the latest family. */
const ALIASES: Readonly<Record<string, string>> = {
  "nemotron-3-nano": "nemotron-3-nano-30b-a3b", "nemotron-3-super": "nemotron-3-super-120b-a12b",
  "nemotron-3-ultra": "nemotron-3-ultra-550b-a55b",
  "nemotron-3.5-lightning": "nemotron-3.5-lightning-30b-a3b",
};

/** Depths that training passes the prediction block for, where that is more than one: the model's report. */
const DEPTHS: Readonly<Record<string, number>> = { "nemotron-3-super-120b-a12b": 2 };

/** Names that namedShape knows: published shapes, presets, and short names of these. */
export function shapeNames(): string[] {
  return [...SHAPES.map(({ name }) => name), ...Object.keys(ALIASES), ...presetNames()];
}

/** The shape of a published model or a preset; null for another name. */
export function namedShape(name: string): ModelShape | null {
  const found = SHAPES.find((shape) => shape.name === name);
  if (found) return found;
  const full = ALIASES[name] ?? name;
  if (!presetNames().includes(full)) return null;
  const shape = shapeOf(preset(full), full);
  return full in DEPTHS ? { ...shape, mtpDepths: DEPTHS[full]! } : shape;
}

export type Method = "fsdp" | "fsdp+ep" | "tp+ep+dp" | "five-way" | "folded" | "other";

/** One published rate. What is left out was not published, and the planner chooses it. */
export interface PublishedRun {
  /** Section of the sources below. */
  readonly table: "F1" | "F2" | "F3" | "F3 scaling" | "F3 context";
  readonly model: string;
  readonly gpu: string;
  readonly gpus: number;
  readonly precision: PlanPrecision;
  readonly method: Method;
  readonly seqlen: number;
  readonly globalBatch: number;
  readonly microBatch?: number;
  readonly layout: {
    readonly tp?: number; readonly cp?: number; readonly pp?: number; readonly ep?: number;
    readonly etp?: number; readonly vpp?: number;
  };
  readonly recompute?: Recompute;
  /** The exchange of experts ran beside computation. */
  readonly overlap?: boolean;
  /** TFLOPS per GPU; null: out of memory. */
  readonly tflops: number | null;
  readonly tokens?: number;
}

const H100_PEAK = 989.5;

interface Folding {
  readonly model: string; readonly gpus: number; readonly method: Method; readonly mfu: number | null;
  readonly layout: PublishedRun["layout"];
}

/** etp that five-way and TP+EP+DP runs without folding have is tp, the default of their time. */
const plain = (tp: number, ep: number, pp = 1, cp = 1) => ({ tp, ep, pp, cp, etp: tp });
const folded = (tp: number, ep: number, pp: number, cp = 1) => ({ tp, ep, pp, cp, etp: 1 });

/** "MoE Parallel Folding" (arXiv 2504.14960), table 3: H100, bf16, 256 sequences of 4096 tokens. */
const TABLE_3: readonly Folding[] = [
  { model: "mixtral-8x22b", gpus: 128, method: "fsdp", mfu: 4.3, layout: plain(8, 1) },
  { model: "mixtral-8x22b", gpus: 128, method: "fsdp+ep", mfu: 23.4, layout: plain(2, 8) },
  { model: "mixtral-8x22b", gpus: 128, method: "tp+ep+dp", mfu: 36.6, layout: plain(4, 8) },
  { model: "mixtral-8x22b", gpus: 128, method: "five-way", mfu: 46.3, layout: plain(2, 4, 8) },
  { model: "mixtral-8x22b", gpus: 128, method: "folded", mfu: 49.3, layout: folded(2, 8, 8) },
  { model: "qwen2-57b-a14b", gpus: 64, method: "fsdp", mfu: 9.9, layout: plain(2, 1) },
  { model: "qwen2-57b-a14b", gpus: 64, method: "fsdp+ep", mfu: 25.4, layout: plain(1, 8) },
  { model: "qwen2-57b-a14b", gpus: 64, method: "tp+ep+dp", mfu: 23.1, layout: plain(4, 4) },
  { model: "qwen2-57b-a14b", gpus: 64, method: "five-way", mfu: 35.3, layout: plain(2, 4, 4) },
  { model: "qwen2-57b-a14b", gpus: 64, method: "folded", mfu: 39, layout: folded(2, 4, 4) },
  { model: "mixtral-8x22b-g8t8", gpus: 128, method: "fsdp", mfu: 2.2, layout: plain(8, 1) },
  { model: "mixtral-8x22b-g8t8", gpus: 128, method: "fsdp+ep", mfu: 9, layout: plain(4, 8) },
  { model: "mixtral-8x22b-g8t8", gpus: 128, method: "tp+ep+dp", mfu: 8.7, layout: plain(8, 8) },
  { model: "mixtral-8x22b-g8t8", gpus: 128, method: "five-way", mfu: 17.1, layout: plain(2, 8, 8) },
  { model: "mixtral-8x22b-g8t8", gpus: 128, method: "folded", mfu: 28.8, layout: folded(4, 8, 8) },
  { model: "llama3-8x70b", gpus: 256, method: "fsdp", mfu: null, layout: plain(8, 1, 1, 8) },
  { model: "llama3-8x70b", gpus: 256, method: "fsdp+ep", mfu: 19.6, layout: plain(8, 8) },
  { model: "llama3-8x70b", gpus: 256, method: "tp+ep+dp", mfu: null, layout: plain(8, 8) },
  { model: "llama3-8x70b", gpus: 256, method: "five-way", mfu: 38.8, layout: plain(8, 4, 8) },
  // The table leaves its etp blank: 1, since tp times ep is more than the 16 ranks of a stage.
  { model: "llama3-8x70b", gpus: 256, method: "folded", mfu: 41.6, layout: folded(8, 8, 16) },
];

/** Table 4: the same layouts, 1024 sequences, more GPUs. */
type Scaling = readonly [
  model: string, method: Method, layout: PublishedRun["layout"], mfu: Readonly<Record<number, number>>];
const TABLE_4: readonly Scaling[] = [
  ["mixtral-8x22b", "five-way", plain(2, 4, 8), { 128: 49.4, 256: 48, 512: 45.5, 1024: 42.3 }],
  ["mixtral-8x22b", "folded", folded(2, 8, 8), { 128: 52.2, 256: 50.7, 512: 48.9, 1024: 44.9 }],
  ["qwen2-57b-a14b", "five-way", plain(2, 4, 4),
    { 64: 36.2, 128: 36, 256: 34.8, 512: 32.5, 1024: 29.8 }],
  ["qwen2-57b-a14b", "folded", folded(2, 4, 4), { 64: 39.9, 128: 39.7, 256: 38.1, 512: 36.6, 1024: 33.4 }],
  ["mixtral-8x22b-g8t8", "folded", folded(4, 8, 8), { 128: 30, 256: 29.3, 512: 26.7, 1024: 25.5 }],
];

/** Table 5: as many tokens in longer sequences, on more GPUs. */
type Context = readonly [
  method: Method, gpus: number, seqlen: number, globalBatch: number, layout: PublishedRun["layout"],
  mfu: number];
const TABLE_5: readonly Context[] = [
  ["five-way", 128, 16384, 1024, plain(2, 4, 8, 4), 45.3],
  ["five-way", 256, 32768, 512, plain(2, 4, 8, 8), 43.2],
  ["five-way", 512, 65536, 256, plain(2, 4, 8, 16), 42.6],
  ["five-way", 1024, 131072, 128, plain(4, 8, 8, 16), 38.2],
  ["folded", 128, 16384, 1024, folded(2, 8, 8, 4), 47.6],
  ["folded", 256, 32768, 512, folded(2, 8, 8, 8), 45.1],
  ["folded", 512, 65536, 256, folded(4, 8, 8, 8), 44.5],
  ["folded", 1024, 131072, 128, folded(8, 8, 8, 8), 42.9],
];

/** The paper does not state micro-batches: 1, as the model zoo's script for Mixtral 8x22B. */
const H100 = { gpu: "h100", precision: "bf16", microBatch: 1 } as const;
const tflopsOf = (mfu: number | null) => mfu === null ? null : (mfu / 100) * H100_PEAK;
const FOLDING: readonly PublishedRun[] = [
  ...TABLE_3.map(({ mfu, ...run }): PublishedRun =>
    ({ table: "F3", ...H100, seqlen: 4096, globalBatch: 256, ...run, tflops: tflopsOf(mfu) })),
  // Table 2: FP8 of the two Mixtral layouts.
  ...[["five-way", plain(2, 4, 8), 575.1], ["folded", folded(2, 8, 8), 631.7]].map(
    ([method, layout, tflops]) => ({
      table: "F3", ...H100, precision: "fp8", model: "mixtral-8x22b", gpus: 128, seqlen: 4096,
      globalBatch: 256, method, layout, tflops,
    }) as PublishedRun),
  ...TABLE_4.flatMap(([model, method, layout, rates]) => Object.entries(rates).map(
    ([gpus, mfu]): PublishedRun => ({
      table: "F3 scaling", ...H100, model, method, gpus: Number(gpus), seqlen: 4096, globalBatch: 1024,
      layout, tflops: tflopsOf(mfu),
    }))),
  ...TABLE_5.map(([method, gpus, seqlen, globalBatch, layout, mfu]): PublishedRun => ({
    table: "F3 context", ...H100, model: "mixtral-8x22b", method, gpus, seqlen, globalBatch, layout,
    tflops: tflopsOf(mfu),
  })),
];

type Measured = readonly [
  model: string, gpu: string, gpus: number, precision: PlanPrecision, seqlen: number, globalBatch: number,
  microBatch: number | null, layout: PublishedRun["layout"], tflops: number, tokens: number | null,
  recompute: Recompute | null, overlap?: true,
];
const measured = (table: "F1" | "F2", rows: readonly Measured[]): PublishedRun[] => rows.map((
  [model, gpu, gpus, precision, seqlen, globalBatch, microBatch, layout, tflops, tokens, recompute,
    overlap]) => ({
  table, method: "other", model, gpu, gpus, precision, seqlen, globalBatch, layout, tflops,
  ...(microBatch === null ? {} : { microBatch }), ...(tokens === null ? {} : { tokens }),
  ...(recompute === null ? {} : { recompute }), ...(overlap ? { overlap } : {}),
}));
const at = (tp: number, pp: number, vpp: number, ep: number, cp = 1) => ({ tp, cp, pp, vpp, ep, etp: 1 });

/**
 * "Scalable Training of MoE Models with Megatron Core" (2026); layouts, batches and recomputation from the
 * launch scripts of the Megatron MoE model zoo, best_practice/. DeepSeek-V3 recomputed its three dense MLPs
 * on GB200, which counts as none here.
 */
const CORE = measured("F1", [
  ["deepseek-v3", "gb300", 256, "mxfp8", 4096, 8192, null, {}, 1233, 4730, null],
  ["deepseek-v3", "gb200", 256, "mxfp8", 4096, 8192, 1, at(1, 4, 4, 64), 1048, 4020, "none"],
  ["deepseek-v3", "gb200", 256, "bf16", 4096, 8192, null, {}, 857, 3298, null],
  ["deepseek-v3", "h100", 1024, "fp8", 4096, 8192, 1, at(2, 8, 4, 64), 368, 1412, "selective", true],
  ["qwen3-235b-a22b", "gb300", 256, "mxfp8", 4096, 8192, 2, at(1, 4, 1, 32), 974, 6583, "none"],
  ["qwen3-235b-a22b", "gb200", 256, "mxfp8", 4096, 3072, 3, at(1, 4, 6, 64), 919, 6212, "selective", true],
  ["qwen3-235b-a22b", "gb200", 256, "bf16", 4096, 8192, 1, at(1, 8, 1, 8), 750, 5100, "none"],
  ["qwen3-235b-a22b", "h100", 256, "bf16", 4096, 2048, 1, at(2, 8, 4, 32), 320, 2132, "selective", true],
  ["qwen3-235b-a22b", "gb300", 128, "mxfp8", 131072, 1024, 1, at(4, 4, 12, 32, 4), 1150, 1556, "selective"],
]);

/**
 * Performance summary of Megatron Bridge, release 26.08, with the batches of its performance recipes
 * (scripts/performance/configs) and of release 25.11.
 */
const BRIDGE = measured("F2", [
  ["deepseek-v3", "gb300", 256, "mxfp8", 4096, 4096, 1, at(1, 2, 8, 32), 1635, null, null],
  ["deepseek-v3", "gb200", 256, "mxfp8", 4096, 4096, 1, at(1, 4, 4, 64), 1276, null, null],
  ["qwen3-235b-a22b", "gb300", 256, "mxfp8", 4096, 8192, null, {}, 1306, null, null],
  ["qwen3-235b-a22b", "gb200", 256, "mxfp8", 4096, 8192, null, {}, 1077, null, null],
  ["qwen3-30b-a3b", "gb300", 8, "mxfp8", 4096, 512, 4, at(1, 1, 1, 8), 1029, null, null],
  ["qwen3-30b-a3b", "gb200", 8, "mxfp8", 4096, 512, 4, at(1, 1, 1, 8), 923, null, null],
  ["nemotron-3-nano", "gb300", 8, "mxfp8", 8192, 512, 4, at(1, 1, 1, 8), 901, 39936, "none"],
  ["nemotron-3-super", "gb300", 64, "mxfp8", 8192, 512, 1, at(1, 1, 1, 64), 831, 9856, "none"],
  ["nemotron-3-super", "gb300", 64, "nvfp4", 8192, 512, 1, at(1, 1, 1, 64), 864, 10240, "none"],
  ["nemotron-3-super", "gb200", 64, "mxfp8", 8192, 512, 1, at(2, 1, 1, 64), 600, null, "moe"],
  ["nemotron-3-super", "gb200", 64, "nvfp4", 8192, 512, 1, at(2, 1, 1, 64), 610, null, "none"],
]);

/** All published rates with enough said of them to predict them. */
export const PUBLISHED_RUNS: readonly PublishedRun[] = [...FOLDING, ...CORE, ...BRIDGE];

/** Published rates that are left out, and why. */
export const LEFT_OUT: readonly string[] = [
  "GPT-OSS-120B on GB200 and GB300: neither precision nor number of GPUs is stated",
  "Nemotron 3 Ultra on GB200 and GB300: FSDP within a domain, its optimiser across domains: no layout here",
  "Nemotron 3.5 Lightning on GB200: precision and layout are not stated",
  "256K tokens relative to short context: neither layout nor GPUs are stated",
];
