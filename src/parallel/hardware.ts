/**
 * GPUs for the planner: what their makers state, and what measurements of others say is reached of it.
 *
 * Peaks are dense (without structured sparsity), bandwidths in one direction. GB is 1e9 bytes.
 */
import { UsageError } from "../tensor/errors.ts";

export const PLAN_PRECISIONS = ["bf16", "fp8", "mxfp8", "nvfp4"] as const;
/** Number format of the products; sums, activations and the optimiser's state are wider. */
export type PlanPrecision = (typeof PLAN_PRECISIONS)[number];

export interface Gpu {
  readonly name: string;
  /** Dense peak of products per second; null where the chip has none of that format. */
  readonly peak: Readonly<Record<PlanPrecision, number | null>>;
  readonly memory: number;
  /** Bytes per second of its memory. */
  readonly memoryRate: number;
  readonly multiprocessors: number;
  /** GPUs in one NVLink domain that groups of powers of two can use: 64 of the 72 of a rack. */
  readonly domain: number;
  /** Bytes per second and direction of one GPU within the domain, and to other domains. */
  readonly inside: number;
  readonly between: number;
  /** Rates of fused causal attention, forward and backward, at 4096 and 16384 tokens. */
  readonly attention: {
    readonly forward: readonly [number, number]; readonly backward: readonly [number, number];
  };
  readonly source: string;
}

const T = 1e12;
const GB = 1e9;

/** Published measurements of fused attention: "Scalable Training of MoE Models with Megatron Core" (2026). */
const HOPPER_ATTENTION = { forward: [553 * T, 638 * T], backward: [422 * T, 523 * T] } as const;
const BLACKWELL_ATTENTION = { forward: [1324 * T, 1698 * T], backward: [1083 * T, 1298 * T] } as const;

const H100: Gpu = {
  name: "h100", peak: { bf16: 989 * T, fp8: 1979 * T, mxfp8: null, nvfp4: null }, memory: 80 * GB,
  memoryRate: 3.35 * T, multiprocessors: 132, domain: 8, inside: 450 * GB, between: 50 * GB,
  attention: HOPPER_ATTENTION,
  source: "NVIDIA H100 data sheet (SXM5): 989 / 1979 TFLOPS dense, 80 GB at 3.35 TB/s, NVLink 4 900 GB/s in "
    + "both directions; DGX H100: 8 GPUs, one 400 Gb/s adapter each",
};

const GPUS: readonly Gpu[] = [
  {
    name: "a100", peak: { bf16: 312 * T, fp8: null, mxfp8: null, nvfp4: null }, memory: 80 * GB,
    memoryRate: 2.039 * T, multiprocessors: 108, domain: 8, inside: 300 * GB, between: 25 * GB,
    attention: { forward: [190 * T, 200 * T], backward: [150 * T, 170 * T] },
    source: "NVIDIA A100 data sheet (SXM4 80 GB): 312 TFLOPS dense, 2039 GB/s, NVLink 3 600 GB/s in both "
      + "directions; DGX A100: 8 GPUs, one 200 Gb/s adapter each; attention: FlashAttention-2 paper, fig. 4",
  },
  H100,
  {
    ...H100, name: "h200", memory: 141 * GB, memoryRate: 4.8 * T,
    source: "NVIDIA H200 data sheet (SXM): the chip of the H100, 141 GB at 4.8 TB/s; DGX H200 as H100",
  },
  {
    name: "b200", peak: { bf16: 2250 * T, fp8: 4500 * T, mxfp8: 4500 * T, nvfp4: 9000 * T },
    memory: 180 * GB, memoryRate: 8 * T, multiprocessors: 148, domain: 8, inside: 900 * GB, between: 50 * GB,
    attention: BLACKWELL_ATTENTION,
    source: "NVIDIA DGX B200 data sheet: 72 PFLOPS FP8 and 144 PFLOPS FP4 with sparsity over 8 GPUs, 1440 GB "
      + "at 64 TB/s, NVLink 5 14.4 TB/s in all, one 400 Gb/s adapter per GPU",
  },
  {
    name: "gb200", peak: { bf16: 2500 * T, fp8: 5000 * T, mxfp8: 5000 * T, nvfp4: 10000 * T },
    memory: 186 * GB, memoryRate: 8 * T, multiprocessors: 148, domain: 64, inside: 900 * GB,
    between: 50 * GB, attention: BLACKWELL_ATTENTION,
    source: "NVIDIA GB200 NVL72 data sheet: 360 PFLOPS BF16, 720 FP8, 1440 FP4 with sparsity over 72 GPUs, "
      + "13.4 TB at 576 TB/s, NVLink 130 TB/s in all; one 400 Gb/s adapter per GPU",
  },
  {
    name: "gb300", peak: { bf16: 2500 * T, fp8: 5000 * T, mxfp8: 5000 * T, nvfp4: 15000 * T },
    memory: 279 * GB, memoryRate: 8 * T, multiprocessors: 148, domain: 64, inside: 900 * GB,
    between: 100 * GB, attention: BLACKWELL_ATTENTION,
    source: "NVIDIA GB300 NVL72 data sheet: 360 PFLOPS BF16, 720 FP8 with sparsity and 1080 FP4 dense over "
      + "72 GPUs, 20 TB at 576 TB/s, NVLink 130 TB/s in all, one 800 Gb/s adapter per GPU",
  },
];

export function gpuNames(): string[] {
  return GPUS.map(({ name }) => name);
}

/** The GPU of that name. Throws UsageError with the names there are. */
export function gpuNamed(name: string): Gpu {
  const found = GPUS.find((gpu) => gpu.name === name.toLowerCase());
  if (found) return found;
  throw new UsageError(`The GPU must be one of ${gpuNames().join(", ")}, found "${name}".`);
}

/** Peak of products in a format. Throws UsageError where the chip has none. */
export function peakOf(gpu: Gpu, precision: PlanPrecision): number {
  const peak = gpu.peak[precision];
  if (peak !== null) return peak;
  const has = PLAN_PRECISIONS.filter((each) => gpu.peak[each] !== null).join(", ");
  throw new UsageError(`The precision must be one of ${has}, which ${gpu.name} has, found ${precision}.`);
}

/**
 * What is reached of the peaks, the same for all models, layouts and GPUs. Those marked * were calibrated on
 * the published rates of `krait plan --validate`; the others follow from their sources.
 */
export interface Efficiencies {
  /** * Share of the dense peak that an endless product of 16-bit numbers reaches, under its power limit. */
  readonly product: number;
  /** * The same for 8-bit and 4-bit numbers. */
  readonly productLow: number;
  /** * Steps of k that a tile's start and end cost as much as, at 16 bits; more as the peak is higher. */
  readonly tileStart: number;
  /** * Share of the 16-bit peak that the scan of Mamba-2 reaches. */
  readonly scan: number;
  /** * Share of the memory's rate that kernels which only move reach. */
  readonly memory: number;
  /** Share of NVLink's rate in rings. */
  readonly inside: number;
  /**
   * Share of NVLink's rate in all-to-alls, and of the network's: exchanges over 64 ranks as the Megatron Core
   * paper times them (4096 tokens to 8 experts: 675 microseconds on GB200, 8.7 ms over the network of H100).
   */
  readonly insideExchange: number;
  readonly between: number;
  /** Seconds that a collective takes beyond its bytes, within a domain and across. */
  readonly startInside: number;
  readonly startBetween: number;
  /** * Seconds from one kernel to the next. */
  readonly kernelGap: number;
  /** * Share of tensor-parallel collectives that computation does not hide. */
  readonly tensorExposed: number;
  /** Share of an overlapped expert exchange that stays exposed: 30-40 % of a step fell to under 5 %. */
  readonly exchangeExposed: number;
  /** * Share of a micro-batch's time that hides reductions of gradients and gathers of parameters. */
  readonly dataOverlap: number;
  /** Share of stage messages that an interleaved pipeline leaves exposed; a plain one leaves all. */
  readonly messageExposed: number;
}

export const EFFICIENCIES: Efficiencies = {
  product: 0.72, productLow: 0.55, tileStart: 384, scan: 0.08, memory: 0.7,
  inside: 0.8, insideExchange: 0.7, between: 0.9, startInside: 12e-6, startBetween: 30e-6,
  kernelGap: 2e-6, tensorExposed: 0.9, exchangeExposed: 0.1, dataOverlap: 0.5, messageExposed: 0.3,
};
