import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";
import { type NormInput, normBackward, normForward } from "./rms_norm.ts";

/**
 * With v = y * silu(z): weight * v / sqrt(mean(v^2) + eps), the mean over each group of neighbouring
 * channels.
 *
 * @param y        f32 [..., I]; the gate z has the same shape
 * @param weight   f32 [I]
 * @param ngroups  number of groups of I / ngroups channels
 * @returns f32 [..., I]
 * @throws ShapeError for shapes that do not belong together, or an I that is not a multiple of ngroups
 *
 * Source: Dao & Gu 2024 (arXiv 2405.21060); state-spaces/mamba, layernorm_gated with norm_before_gate =
 * false.
 */
export const gated_rms_norm = defineOp({
  name: "gated_rms_norm",
  forward(ctx, y: Tensor, z: Tensor, weight: Tensor, ngroups: number, eps: number): Tensor {
    const I = y.shape.at(-1) ?? 0;
    check(y.shape.length > 0, "gated_rms_norm", "y", "[..., I]", y);
    check(z.shape.join() === y.shape.join(), "gated_rms_norm", "z", `[${y.shape.join(", ")}]`, z);
    check(weight.shape.length === 1 && weight.shape[0] === I, "gated_rms_norm", "weight", `[${I}]`, weight);
    const divides = Number.isInteger(ngroups) && ngroups > 0 && I % ngroups === 0;
    check(divides, "gated_rms_norm", "ngroups", `a divisor of ${I}`, ngroups);
    const input = { x: y, z, weight, ngroups };
    const { out, rstd } = normForward(input, eps);
    ctx.save({ input, rstd });
    return out;
  },
  backward({ input, rstd }: { input: NormInput; rstd: Tensor }, [dout], needs, into) {
    if (!dout) return [];
    const wants = { input: needs[0]! || needs[1]!, weight: needs[2]! };
    const { dx, dz, dweight } = normBackward(input, rstd, dout, wants, into, 2);
    return [dx, dz, dweight];
  },
});
