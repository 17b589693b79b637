import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import { DTypeError } from "../tensor/errors.ts";
import { seedWords } from "../tensor/philox.ts";
import type { Tensor, TensorDType } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/** Moments of eight bits: elements that share a scale. */
export const MOMENT_BLOCK = 64;

/** A stretch of elements that belong to one parameter. */
export interface Stretch {
  /** Its first element, a multiple of 4, or of 64 where moments have eight bits. */
  readonly first: number;
  readonly size: number;
  /** Whether weight_decay applies to it. */
  readonly decays: boolean;
}

/** What one workgroup of `adamw` takes, in units of 4 elements; whole blocks. */
const slabOf = (device: Device): number => device.info.isSoftware ? 512 : 128;

/** Stretches cut into what one workgroup of `adamw` takes: first and end in units of 4, and decay. */
export function slabsOf(device: Device, stretches: readonly Stretch[]): number[][] {
  const slab = slabOf(device);
  return stretches.flatMap(({ first, size, decays }) => {
    const end = Math.ceil((first + size) / 4);
    return Array.from({ length: Math.ceil(Math.ceil(size / 4) / slab) }, (_, i) =>
      [first / 4 + i * slab, Math.min(first / 4 + (i + 1) * slab, end), decays ? 1 : 0]);
  });
}

/**
 * The slabs of stretches on the device.
 * @param least  rows of the table at least; those beyond the slabs name no elements
 * @returns u32 [slabs, 3]: first and end in units of 4 elements, and 1 for decay. A stretch whose size is no
 *   multiple of 4 counts up to the next: what lies there must be nobody's.
 */
export function stretchTable(device: Device, stretches: readonly Stretch[], least = 0): Tensor {
  const rows = slabsOf(device, stretches);
  while (rows.length < least) rows.push([0, 0, 0]);
  return device.tensor(Uint32Array.from(rows.flat()), [rows.length, 3]);
}

/** How moments are stored, and the dtype of tensors of them. */
export const MOMENT_DTYPES = { f32: "f32", bf16: "bf16", "8bit": "u32" } as const;
export type MomentFormat = keyof typeof MOMENT_DTYPES;

/** Elements of a tensor of moments for `size` parameters. */
export function momentElements(size: number, dtype: TensorDType): number {
  return dtype === "u32" ? Math.ceil(size / MOMENT_BLOCK) * (MOMENT_BLOCK / 4 + 1) : size;
}

export interface AdamWRounding {
  /** Of the random bits that round moments and bf16 parameters. */
  readonly seed: number | bigint;
  /** Tells calls of one step apart. */
  readonly stream: number;
}

/**
 * One AdamW step in place, for many parameters in one launch:
 * param -= lr * weight_decay * param, then param -= lr * mhat / (sqrt(vhat) + eps).
 *
 * @param param       f32 or bf16 [n] with n a multiple of 4, changed: parameters side by side
 * @param grad        f32 [n]
 * @param m, v        changed: f32 or bf16 [n], or u32 [17 blocks] for blocks of 64: codes of eight bits, four
 *   in a word, and then one f32 scale for every block
 * @param table       u32 [slabs, 3], of `stretchTable`; what no slab names stays as it is
 * @param hyper       f32 [8]: lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, 1 - beta2^t, t - 1. The
 *   kernel forms 1 - beta in f32, so the two corrections should be computed from the betas as rounded to f32.
 * @param grad_scale  f32 [1], multiplies the gradient first (a clip factor, or 1); negative: nothing changes
 * @param low         u32 [n / 2], changed: the low halves of f32 masters of bf16 parameters; or null
 * @throws ShapeError when the shapes differ; DTypeError for formats that do not belong together
 *
 * Numerics  f32 arithmetic. Moments below f32, and bf16 parameters without masters, are rounded at random.
 */
export const adamw = defineOp({
  name: "adamw",
  mutates: [0, 2, 3, 7],
  halves: [0, 2, 3],
  forward(
    _ctx, param: Tensor, grad: Tensor, m: Tensor, v: Tensor, table: Tensor, hyper: Tensor, grad_scale: Tensor,
    low: Tensor | null = null, { seed, stream }: AdamWRounding = { seed: 0, stream: 0 },
  ): Tensor[] {
    const { size, device } = param;
    const bytes = m.dtype === "u32";
    check(param.shape.length === 1 && size % 4 === 0, "adamw", "param", "[a multiple of 4]", param);
    check(grad.shape.join() === `${size}`, "adamw", "grad", `[${size}]`, grad);
    for (const [what, tensor] of [["m", m], ["v", v]] as const) {
      const elements = momentElements(size, tensor.dtype);
      check(tensor.shape.join() === `${elements}`, "adamw", what, `[${elements}]`, tensor);
    }
    check(table.shape.length === 2 && table.shape[1] === 3, "adamw", "table", "[slabs, 3]", table);
    check(hyper.size === 8, "adamw", "hyper", "[8]", hyper);
    check(grad_scale.size === 1, "adamw", "grad_scale", "[1]", grad_scale);
    checkDType("table", table, ["u32"]);
    checkDType("param", param, low ? ["bf16"] : ["f32", "bf16"]);
    checkDType("m", m, ["f32", "bf16", "u32"]);
    checkDType("v", v, [m.dtype]);
    if (low) {
      check(low.shape.join() === `${size / 2}`, "adamw", "low", `[${size / 2}]`, low);
      checkDType("low", low, ["u32"]);
    }
    const slabs = table.shape[0]!;
    const [seed_low, seed_high] = seedWords(seed);
    launch("optim/adamw", {
      bind: { param, grad, m, v, slabs: table, hyper, grad_scale, low: low ?? device.empty([4], "u32") },
      params: {
        count: slabs, seed_low, seed_high, stream,
        scales: Math.ceil(size / MOMENT_BLOCK) * (MOMENT_BLOCK / 4),
      },
      constants: bytes && device.info.isSoftware ? { WG: 32, LANES: 1 } : { WG: 64, LANES: 16 },
      conditions: [
        ...low ? ["masters" as const] : param.dtype === "bf16" ? ["p_bf16" as const] : [],
        ...m.dtype === "bf16" ? ["m_bf16" as const] : [], ...bytes ? ["bytes" as const] : [],
      ],
      workgroups: [slabs],
    });
    return [];
  },
});

function checkDType(what: string, tensor: Tensor, expected: readonly TensorDType[]): void {
  if (expected.includes(tensor.dtype)) return;
  throw new DTypeError(`adamw: ${what} must be ${expected.join(" or ")}, found ${tensor.dtype}.`);
}
