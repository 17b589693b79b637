/** Products of so few rows that only reading the weight counts: decoding. Not ops themselves. */
import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import type { Device } from "../tensor/device.ts";
import { isHalf, type Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { convert } from "./cast.ts";
import { conditions, converted, type Epilogue, type FloatDType } from "./gemm.ts";

/**
 * Kernels for few rows: `matvec_quad` for software adapters, `matvec` for GPUs, and for the tuner to try
 * `matvec_split`, where few outputs would leave a GPU idle: workgroups share the sum over k, and a second
 * launch adds their parts.
 */
export type VectorKernel = "matvec_quad" | "matvec" | "matvec_split";

export function isVectorKernel(kernel: string | null | undefined): kernel is VectorKernel {
  return kernel === "matvec_quad" || kernel === "matvec" || kernel === "matvec_split";
}

/** A sum is split until there are so many workgroups, but not into parts shorter than PART_K. */
const WANTED = 1024;
const PART_K = 256;
const MOST_PARTS = 32;

type VectorShape = {
  readonly m: number; readonly n: number; readonly k: number; readonly weight: string;
};

const vectorTuning = defineTunable({
  name: "matmul/few_rows",
  classOf: (shape: VectorShape) => ({ ...shape, n: bucket(shape.n), k: bucket(shape.k, 16384) }),
  candidates: (_device: Device, { m, n, k }): VectorKernel[] => [
    "matvec_quad", "matvec", ...(partsOf(m, n, k) > 1 ? ["matvec_split" as const] : []),
  ],
  fallback: ({ info }) => info.isSoftware ? "matvec_quad" : "matvec",
  trial: (device, { m, n, k, weight }) => trial(() => ({
    x: randomTensor(device, [m, k], 0, k ** -0.25),
    w: converted(randomTensor(device, [n, k], 1, k ** -0.25), weight as FloatDType),
  }), ({ x, w }, kernel: VectorKernel) => {
    const y = device.empty([m, n]);
    vectorProduct(kernel, x, w, y);
    return y;
  }),
  tolerance: ({ k }) => 8 * Math.sqrt(Math.max(k, 1)) * 2 ** -24,
});

/** Parts of the sum over k of matvec_split. */
function partsOf(m: number, n: number, k: number): number {
  const workgroups = Math.max(1, m * Math.ceil(n / 4));
  return Math.max(1, Math.min(Math.floor(WANTED / workgroups), Math.floor(k / PART_K), MOST_PARTS));
}

/**
 * The kernel for a product of f32 x with so few rows that only reading the weight counts; null for others.
 */
export function vectorKernel(x: Tensor, weight: Tensor, rows: number): VectorKernel | null {
  if (!readsInVectors(x, weight) || rows > (x.device.info.isSoftware ? 2 : 4)) return null;
  const [n, k] = weight.shape.slice(-2) as [number, number];
  return choose(x.device, vectorTuning, { m: rows, n, k, weight: weight.dtype });
}

/** Whether matvec kernels can read the factors: x is f32, and rows of halves are whole vectors of four. */
export function readsInVectors(x: Tensor, weight: Tensor): boolean {
  return !isHalf(x.dtype) && (!isHalf(weight.dtype) || weight.shape.at(-1)! % 4 === 0);
}

/**
 * y = x W^T with an epilogue: x [m, k], weight [n, k]; with `offsets` u32 [experts + 1] a matrix per expert.
 */
export function vectorProduct(
  kernel: VectorKernel, x: Tensor, weight: Tensor, y: Tensor, { bias, relu2 = false, residual }: Epilogue =
    {},
  offsets: Tensor | null = null,
): void {
  const [n, k] = weight.shape.slice(-2) as [number, number];
  const m = y.size / Math.max(n, 1);
  const work = m * Math.ceil(n / 4);
  const whole = isHalf(y.dtype) ? y.device.empty(y.shape) : y;
  const parts = kernel === "matvec_split" ? partsOf(m, n, k) : 1;
  const sums = parts > 1 ? y.device.empty([parts, m, n]) : null;
  const width = k % 4 === 0 ? 4 : 1;
  const params = {
    m, n, k, experts: offsets ? weight.shape[0]! : 0, parts, steps: Math.ceil(k / width / parts),
  };
  const ends = conditions({ bias: !!bias, relu2, residual: !!residual });
  const added = { bias: bias ?? weight, residual: residual ?? weight };
  launch("matmul/matvec", {
    entry: kernel === "matvec_quad" ? "matvec_quad" : "matvec",
    bind: { x, weight, y: sums ?? whole, offsets: offsets ?? weight, ...added },
    params,
    conditions: [...(sums ? ["split" as const] : ends), ...conditions({
      vec4: width === 4, grouped: offsets !== null,
      w_f16: weight.dtype === "f16", w_bf16: weight.dtype === "bf16",
    })],
    workgroups: [kernel === "matvec_quad" ? Math.ceil(work / 16) : work * parts],
  });
  if (sums) {
    launch("matmul/matvec", {
      entry: "matvec_sum", bind: { sums, y: whole, ...added }, params, conditions: ends,
      workgroups: [Math.ceil((m * n) / 64)],
    });
  }
  if (whole !== y) convert(whole, y);
}
