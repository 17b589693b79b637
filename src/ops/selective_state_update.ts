import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { checkShape, LARGEST } from "./chunking.ts";
import { defineOp } from "./op.ts";

const WG = 32;

/**
 * One decode step of the scan: S <- exp(dt A) S + dt x (outer) B, y = S C + D x.
 *
 * @param state    (B, H, P, N) f32; changed
 * @param xBC      (B, H P + 2 G N) f32: x, B and C after each other, as `causal_conv1d_update` gives them;
 *                 head h reads group floor(h / (H/G))
 * @param dt_raw   (B, H) f32; dt = clamp(softplus(dt_raw + dt_bias), lo, hi)
 * @param A_log    (H) f32; A = -exp(A_log)
 * @param D        (H) f32
 * @param dt_bias  (H) f32
 * @param dt_limit [lo, hi], hi up to Infinity
 * @returns        y (B, H, P) f32
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6; state-spaces/mamba selective_state_update.
 * Tested   test/ops/selective_state_update.samples.ts against reference/selective_state_update.ts
 */
export const selective_state_update = defineOp({
  name: "selective_state_update",
  mutates: [0],
  forward(
    _ctx, state: Tensor, xBC: Tensor, dt_raw: Tensor, A_log: Tensor, D: Tensor, dt_bias: Tensor,
    dt_limit: readonly [number, number],
  ) {
    const op = "selective_state_update";
    check(state.shape.length === 4, op, "state", "[batch, nheads, headdim, dstate]", state);
    const [batch, nheads, headdim, dstate] = state.shape as [number, number, number, number];
    const ngroups = ((xBC.shape[1] ?? 0) - nheads * headdim) / (2 * dstate);
    const expected = `[${batch}, ${nheads * headdim} + 2 ngroups ${dstate}] with ngroups dividing ${nheads}`;
    const fits = xBC.shape.length === 2 && xBC.shape[0] === batch && ngroups > 0 && nheads % ngroups === 0;
    check(fits, op, "xBC", expected, xBC);
    checkShape(op, "dt_raw", dt_raw, [batch, nheads]);
    checkShape(op, "A_log", A_log, [nheads]);
    checkShape(op, "D", D, [nheads]);
    checkShape(op, "dt_bias", dt_bias, [nheads]);
    const { device } = state;
    const vec4 = dstate % 4 === 0 && (nheads * headdim) % 4 === 0;
    const quad = device.hasSubgroups;
    const rows8 = vec4 && quad && device.info.isSoftware && headdim % 8 === 0;
    const y = device.empty([batch, nheads, headdim]);
    const total = (batch * nheads * headdim) / (rows8 ? 8 : 1);
    launch("mamba2/selective_state_update", {
      bind: { state, xBC, dt_raw, A_log, dt_bias, D, y },
      params: {
        nheads, headdim, ngroups, dstate, total, lo: dt_limit[0], hi: Math.min(dt_limit[1], LARGEST),
      },
      conditions: [
        ...(vec4 ? ["vec4" as const] : []), ...(quad ? ["subgroups" as const] : []),
        ...(rows8 ? ["rows8" as const] : []),
      ],
      workgroups: [Math.ceil((total * (quad ? 4 : 1)) / WG)],
    });
    return y;
  },
});
