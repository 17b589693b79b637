import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { chunk_cumsum } from "./chunk_cumsum.ts";
import { checkShape, groups, quads } from "./chunking.ts";
import { defineOp } from "./op.ts";

/**
 * One decode step of the scan: S <- exp(dt A) S + dt x (outer) B, y = S C + D x.
 *
 * @param state    (B, H, P, N) f32; changed
 * @param x        (B, H, P) f32
 * @param dt_raw   (B, H) f32; dt = clamp(softplus(dt_raw + dt_bias), lo, hi)
 * @param A_log    (H) f32; A = -exp(A_log)
 * @param B        (B, G, N) f32; head h reads group floor(h / (H/G))
 * @param C        (B, G, N) f32
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
    _ctx, state: Tensor, x: Tensor, dt_raw: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor,
    dt_bias: Tensor, dt_limit: readonly [number, number],
  ) {
    const op = "selective_state_update";
    check(state.shape.length === 4, op, "state", "[batch, nheads, headdim, dstate]", state);
    const [batch, nheads, headdim, dstate] = state.shape as [number, number, number, number];
    checkShape(op, "x", x, [batch, nheads, headdim]);
    checkShape(op, "dt_raw", dt_raw, [batch, nheads]);
    const ngroups = B.shape[1] ?? 1;
    const groupsFit = nheads % ngroups === 0;
    check(groupsFit, op, "B", `[${batch}, ngroups, ${dstate}] with ngroups dividing ${nheads}`, B);
    checkShape(op, "B", B, [batch, ngroups, dstate]);
    checkShape(op, "C", C, B.shape);
    checkShape(op, "D", D, [nheads]);
    const steps = dt_raw.reshape([batch, 1, nheads]);
    const [dt, dA] = chunk_cumsum(steps, A_log, dt_bias, 1, dt_limit) as [Tensor, Tensor];
    const y = x.device.empty(x.shape);
    launch("mamba2/selective_state_update", {
      bind: { state, x, dt, dA, B, C, D, y }, params: { nheads, headdim, ngroups, dstate, total: x.size },
      conditions: quads(dstate), workgroups: groups(x.size),
    });
    return y;
  },
});
