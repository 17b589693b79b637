import { launch } from "../kernel/launch.ts";
import { bucket, choose, defineTunable } from "../kernel/tuner.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { randomTensor, trial } from "../tensor/trial.ts";
import { type Destinations, defineOp, NOWHERE } from "./op.ts";

/** The input of a norm over `ngroups` groups of n columns; with z it is x * silu(z). */
export interface NormInput {
  readonly x: Tensor;
  readonly z: Tensor | null;
  readonly weight: Tensor;
  readonly ngroups: number;
  /** Default: what suits the adapter and the shape. */
  readonly kernel?: NormKernel;
}

/**
 * How rows are shared out: `rows` four to an invocation, the others one to a workgroup of so many. A
 * workgroup per row needs barriers, which are dear on a CPU; for a few long rows they are the smaller evil.
 */
type NormKernel = "rows" | "row_32" | "row_64" | "row_256";

type NormShape = {
  readonly tokens: number; readonly ngroups: number; readonly n: number; readonly gated: boolean;
  /** The backward pass counts, too. */
  readonly training: boolean;
};

const normTuning = defineTunable({
  name: "norm/rms_norm",
  classOf: ({ tokens, ngroups, n, gated, training }: NormShape) => ({
    tokens: bucket(tokens), ngroups, n: bucket(n), gated, training,
  }),
  candidates: (device: Device, { n }): NormKernel[] => {
    if (device.info.isSoftware) return ["rows", "row_32"];
    return n > 256 ? ["row_64", "row_256"] : ["row_64"]; // vectors of four for every invocation
  },
  fallback: (device, { tokens, ngroups, n }) => {
    if (device.info.isSoftware) return tokens * ngroups < 8 && n >= 1024 ? "row_32" : "rows";
    return n > 1024 ? "row_256" : "row_64";
  },
  trial: (device, { tokens, ngroups, n, gated, training }) => trial(() => ({
    x: randomTensor(device, [tokens, ngroups * n]), weight: randomTensor(device, [ngroups * n], 1),
    dout: randomTensor(device, [tokens, ngroups * n], 2),
    ...gated ? { z: randomTensor(device, [tokens, ngroups * n], 3) } : {},
  }), ({ x, weight, dout, z = null }: Record<"x" | "weight" | "dout", Tensor> & { z?: Tensor | null },
    kernel: NormKernel) => {
    const input = { x, z, weight, ngroups, kernel };
    const { out, rstd } = normForward(input, 1e-5);
    if (!training) return out;
    const { dx, dz, dweight } = normBackward(input, rstd, dout, { input: true, weight: true }, NOWHERE, 2);
    return [out, ...[dx, dz, dweight].filter((each) => each !== null)];
  }),
  tolerance: ({ tokens, n, training }) => (training ? 4 : 1) * 8 * Math.sqrt(Math.max(tokens, n)) * 2 ** -24,
});

/** Sizes of the kernels, and how the rows are shared out. */
function plan({ x, z, weight, ngroups, kernel }: NormInput) {
  const n = weight.size / ngroups;
  const tokens = weight.size === 0 ? 0 : x.size / weight.size;
  const isWide = n % 4 === 0;
  const chosen = kernel ?? choose(x.device, normTuning, {
    tokens, ngroups, n, gated: z !== null, training: weight.requiresGrad,
  });
  const byRows = chosen === "rows";
  const WG = byRows ? 16 : Number(chosen.slice("row_".length));
  const conditions: ("vec4" | "gated")[] = isWide ? ["vec4"] : [];
  if (z) conditions.push("gated");
  return {
    byRows, tokens, n, cols: isWide ? n / 4 : n, constants: { WG }, conditions,
    workgroups: [byRows ? Math.ceil((Math.ceil(tokens / 4) * ngroups) / WG) : tokens * ngroups] as [number],
  };
}

/** Launches the norm; `rstd` [tokens, ngroups] is what the backward pass needs beside the input. */
export function normForward(input: NormInput, eps: number): { out: Tensor; rstd: Tensor } {
  const { x, z, weight, ngroups } = input;
  const { byRows, tokens, n, cols, ...how } = plan(input);
  const out = x.device.empty(x.shape);
  const rstd = x.device.empty([tokens, ngroups]);
  launch("norm/rms_norm", {
    // Without the condition `gated` z is bound but never read, so any tensor will do.
    entry: byRows ? "rms_norm_rows" : "rms_norm_row", bind: { x, z: z ?? x, weight, out, rstd },
    params: { tokens, ngroups, cols, n, eps }, ...how,
  });
  return { out, rstd };
}

/** Gradients of the norm; those that are not wanted are null. The weight is argument `at` of the op. */
export function normBackward(
  input: NormInput, rstd: Tensor, dout: Tensor, wants: { input: boolean; weight: boolean },
  into: Destinations, at: number,
): { dx: Tensor | null; dz: Tensor | null; dweight: Tensor | null } {
  const { x, z, weight, ngroups } = input;
  const { device } = x;
  const { byRows, tokens, n, cols, ...how } = plan(input);
  let dx: Tensor | null = null;
  let dz: Tensor | null = null;
  // Rows taken by fours leave the weight's partial sums behind; otherwise those take a pass of their own.
  const left = byRows && wants.input;
  const perPart = left ? 4 : Math.max(32, Math.ceil(tokens / 256));
  const nparts = Math.ceil(tokens / perPart);
  const partial = device.empty([left || wants.weight ? nparts : 0, weight.size]);
  if (wants.input) {
    dx = device.empty(x.shape);
    dz = device.empty(z ? z.shape : [0]); // not written without z
    const soFar = z ? null : into.soFar(0);
    const bind = { x, z: z ?? soFar ?? x, weight, rstd, dout, dx, dz };
    const params = { tokens, ngroups, cols, n };
    const conditions = soFar ? [...how.conditions, "added" as const] : how.conditions;
    if (byRows) {
      launch("norm/rms_norm_backward", {
        entry: "rms_norm_backward_rows", bind: { ...bind, partial }, params, ...how, conditions,
      });
    } else {
      launch("norm/rms_norm_backward", { entry: "rms_norm_backward_row", bind, params, ...how, conditions });
    }
  }
  let dweight: Tensor | null = null;
  if (wants.weight) {
    dweight = into.empty(at, weight);
    const params = { tokens, ngroups, cols, per_part: perPart, nparts };
    const WG = device.info.isSoftware ? 16 : 64;
    const { conditions } = how;
    if (!left) {
      launch("norm/weight_gradient", {
        entry: "sum_tokens", bind: { x, z: z ?? x, rstd, dout, partial }, params, constants: { WG },
        conditions, workgroups: [Math.ceil((nparts * ngroups * cols) / WG)],
      });
    }
    launch("norm/weight_gradient", {
      entry: "sum_parts", bind: { partial, dweight }, params, constants: { WG }, conditions,
      workgroups: [Math.ceil((ngroups * cols) / WG)],
    });
  }
  return { dx, dz: z && dz, dweight };
}

/**
 * weight * x / sqrt(mean(x^2) + eps), the mean over the last dimension.
 *
 * @param x       f32 [..., D]
 * @param weight  f32 [D]
 * @returns f32 [..., D]
 * @throws ShapeError for a weight of another width
 *
 * Source: Zhang & Sennrich 2019 (arXiv 1910.07467).
 */
export const rms_norm = defineOp({
  name: "rms_norm",
  forward(ctx, x: Tensor, weight: Tensor, eps: number): Tensor {
    const D = x.shape.at(-1) ?? 0;
    check(x.shape.length > 0, "rms_norm", "x", "[..., D]", x);
    check(weight.shape.length === 1 && weight.shape[0] === D, "rms_norm", "weight", `[${D}]`, weight);
    const input = { x, z: null, weight, ngroups: 1 };
    const { out, rstd } = normForward(input, eps);
    ctx.save({ input, rstd });
    return out;
  },
  backward({ input, rstd }: { input: NormInput; rstd: Tensor }, [dout], needs, into) {
    if (!dout) return [];
    const wants = { input: needs[0]!, weight: needs[1]! };
    const { dx, dweight } = normBackward(input, rstd, dout, wants, into, 1);
    return [dx, dweight];
  },
});
