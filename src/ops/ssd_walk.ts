import { GpuError } from "../gpu/errors.ts";
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Device } from "../tensor/device.ts";
import type { Tensor } from "../tensor/tensor.ts";
import {
  checkGroups, checkSeqIdx, checkShape, documents, groups, LARGEST, rangeAt, sumRows,
} from "./chunking.ts";
import { defineOp } from "./op.ts";

const WG = 32; // eight quads
/** Tokens between states that the backward pass keeps; four times CHUNK of the kernels. */
const CHUNK = 64;
/** Most pieces (16 p of a head) of a group in one launch of the backward pass: each leaves parts behind. */
const PIECES = 32;
const ROWS = 16; // of a piece, for loops that compilers are not to unroll

/** Whether `ssd_walk` runs on a device with heads and states of these widths. */
export function canWalk(device: Device, headdim: number, dstate: number): boolean {
  return device.hasSubgroups && headdim % 4 === 0 && dstate % 16 === 0;
}

/** Slices of the state's columns, each walked by launches of its own: 32 wide, the last one perhaps 16. */
function slices(dstate: number): { first_n: number; width: number; conditions: "n32"[] }[] {
  return Array.from({ length: Math.ceil(dstate / 32) }, (_, i) => {
    const width = Math.min(32, dstate - 32 * i);
    return { first_n: 32 * i, width, conditions: width === 32 ? ["n32"] : [] };
  });
}

/**
 * The selective scan of Mamba-2 as `ssd_scan` defines it, token after token with the state in registers: for
 * software adapters.
 *
 * @param x             (B, L, H, P) f32, P a multiple of 4
 * @param dt_raw        (B, L, H) f32; dt = clamp(softplus(dt_raw + dt_bias), lo, hi)
 * @param A_log         (H) f32; A = -exp(A_log)
 * @param B,C           (B, L, G, N) f32, N a multiple of 16; head h reads group floor(h / (H/G))
 * @param D             (H) f32
 * @param dt_bias       (H) f32
 * @param initial_state (B, H, P, N) f32 or null for zeros
 * @param seq_idx       (B, L) i32 or null
 * @param dt_limit      [lo, hi], hi up to Infinity
 * @returns             y (B, L, H, P) and final_state (B, H, P, N) f32
 *
 * Numerics  products of decays, each exp of a value <= 0; sums in f32.
 * Cost      2.3 B L H P N multiply-adds forward, 6.5 backward; memory forward is that of the result, backward
 *           that of a state per 64 tokens and of at most 32 times B or C.
 * Throws    ShapeError for shapes that do not fit, GpuError for a device without subgroups.
 * Source    Dao & Gu 2024 (arXiv 2405.21060) sections 3 and 6, with chunks of four.
 * Tested    test/ops/ssd_walk.samples.ts against reference/ssd_scan.ts
 */
export const ssd_walk = defineOp({
  name: "ssd_walk",
  forward(
    ctx, x: Tensor, dt_raw: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    initial_state: Tensor | null, seq_idx: Tensor | null, dt_limit: readonly [number, number],
  ) {
    const op = "ssd_walk";
    checkGroups(op, x, "B", B);
    const { device } = x;
    if (!device.hasSubgroups) {
      throw new GpuError("ssd_walk needs a device with subgroups, which this one lacks; use ssd_scan.");
    }
    const [batch, seqlen, nheads, headdim] = x.shape as [number, number, number, number];
    const [, , ngroups, dstate] = B.shape as [number, number, number, number];
    check(headdim % 4 === 0, op, "x", "of a headdim that is a multiple of 4", x);
    check(dstate % 16 === 0, op, "B", "of a dstate that is a multiple of 16", B);
    checkShape(op, "C", C, B.shape);
    checkShape(op, "dt_raw", dt_raw, [batch, seqlen, nheads]);
    for (const [name, each] of Object.entries({ A_log, D, dt_bias })) checkShape(op, name, each, [nheads]);
    if (initial_state) checkShape(op, "initial_state", initial_state, [batch, nheads, headdim, dstate]);
    checkSeqIdx(op, seq_idx, batch, seqlen);
    const blocks = Math.ceil(seqlen / 4);
    const [lo, hi] = [dt_limit[0], Math.min(dt_limit[1], LARGEST)];
    const steps = device.empty([batch, nheads, 1 + 2 * blocks, 4]);
    const total = batch * blocks * nheads;
    launch("mamba2/ssd_steps", {
      bind: { dt_raw, A_log, dt_bias, D, seq_idx: seq_idx ?? dt_raw, steps },
      params: { seqlen, nheads, blocks, total, lo, hi },
      conditions: documents(seq_idx), workgroups: groups(total),
    });
    const y = device.empty(x.shape);
    const final_state = device.empty([batch, nheads, headdim, dstate]);
    const p32 = headdim > 16;
    const quads = batch * nheads * Math.ceil(headdim / (p32 ? 32 : 16));
    for (const { first_n, conditions } of slices(dstate)) {
      launch("mamba2/ssd_walk", {
        bind: { x, B, C, steps, initial_state: initial_state ?? x, y, final_state },
        params: { seqlen, nheads, headdim, ngroups, dstate, first_n, blocks, total: quads, rows: ROWS },
        conditions: [
          "subgroups", ...conditions, ...(p32 ? ["p32" as const] : []),
          ...(initial_state ? ["initial" as const] : []), ...(first_n > 0 ? ["accumulate" as const] : []),
        ],
        workgroups: [Math.ceil((4 * quads) / WG)],
      });
    }
    ctx.save({ x, dt_raw, A_log, B, C, dt_bias, initial_state, steps, lo, hi });
    return [y, final_state];
  },
  backward({ x, dt_raw, A_log, B, C, dt_bias, initial_state, steps, lo, hi }, [dy_or_null, dfinal]) {
    const { device } = x;
    const [batch, seqlen, nheads, headdim] = x.shape as [number, number, number, number];
    const [, , ngroups, dstate] = B.shape as [number, number, number, number];
    const dy = dy_or_null ?? device.zeros(x.shape);
    const blocks = Math.ceil(seqlen / 4);
    const chunks = Math.ceil(seqlen / CHUNK);
    const rowTiles = Math.ceil(headdim / 16);
    const tiles = rowTiles * slices(dstate).length;
    const pieces = (nheads / ngroups) * rowTiles;
    const most = Math.min(pieces, PIECES);
    const shape = { batch, seqlen, nheads, headdim, ngroups, dstate, blocks, chunks, tiles, rows: ROWS };

    // dstates[chunks] is the gradient of the final state; what enters chunk c has it in dstates[c].
    const dstates = device.empty([chunks + 1, batch, nheads, headdim, dstate]);
    const stateBytes = dstates.byteLength / (chunks + 1);
    const lastAt = dstates.byteOffset + chunks * stateBytes;
    if (dfinal) device.stream.copy(dfinal.storage, dfinal.byteOffset, dstates.storage, lastAt, stateBytes);
    else device.stream.clear(dstates.storage, lastAt, stateBytes);

    const dx = device.empty(x.shape);
    const room = most * B.size * (Math.min(32, dstate) / Math.max(dstate, 1));
    const walk = (kernel: "mamba2/ssd_walk_dx" | "mamba2/ssd_walk_dC", sums: number) => {
      const parts = device.empty([sums * 4 + room]);
      const out = device.empty(B.shape);
      slices(dstate).forEach(({ first_n, width, conditions }, i) => {
        for (let first_piece = 0; first_piece < pieces; first_piece += most) {
          const count = Math.min(most, pieces - first_piece);
          const params = {
            ...shape, first_n, first_piece, pieces: count, first_tile: i * rowTiles, pieces_at: sums,
          };
          const workgroups: [number] = [Math.ceil((4 * batch * ngroups * count) / WG)];
          if (kernel === "mamba2/ssd_walk_dx") {
            launch(kernel, {
              bind: { x, B, C, steps, dy, dstates, dx, parts }, params, workgroups,
              conditions: ["subgroups", ...conditions, ...(i > 0 ? ["accumulate" as const] : [])],
            });
          } else {
            launch(kernel, {
              bind: { x, B, C, steps, dy, initial_state: initial_state ?? x, dstates, parts },
              params, workgroups,
              conditions: ["subgroups", ...conditions, ...(initial_state ? ["initial" as const] : [])],
            });
          }
          const total = batch * seqlen * ngroups * (width / 4);
          launch("mamba2/sum_pieces", {
            bind: { parts, out },
            params: {
              pieces: count, cols: width / 4, stride: dstate / 4, first: first_n / 4, at: sums, total,
            },
            conditions: first_piece > 0 ? ["accumulate"] : [], workgroups: [Math.ceil(total / WG)],
          });
        }
      });
      return [out, parts] as const;
    };
    const [dB, inputs] = walk("mamba2/ssd_walk_dx", batch * nheads * 4 * blocks * tiles);
    const [dC, outputs] = walk("mamba2/ssd_walk_dC", batch * nheads * (blocks + chunks) * tiles);

    const ddt_raw = device.empty(dt_raw.shape);
    const apart = rangeAt(nheads);
    const sums = device.empty([batch * chunks, 3 * apart]);
    const total = batch * chunks * nheads;
    launch("mamba2/ssd_steps_backward", {
      bind: { dt_raw, A_log, dt_bias, inputs, outputs, steps, ddt_raw, sums },
      params: { seqlen, nheads, blocks, chunks, tiles, total, lo, hi, apart },
      workgroups: [Math.ceil(total / WG)],
    });
    const all = sumRows(sums, 3 * apart);
    const [dA_log, ddt_bias, dD] = [0, 1, 2].map((i) => all.range(i * apart, [nheads]));
    const dinitial = initial_state ? dstates.prefix(initial_state.shape) : null;
    return [dx, ddt_raw, dA_log, dB, dC, dD, ddt_bias, dinitial];
  },
});
