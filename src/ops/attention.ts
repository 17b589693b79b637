import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { copyColumns } from "./elementwise.ts";
import { defineOp } from "./op.ts";

export interface AttentionOptions {
  /** Multiplies the scores, usually 1 / sqrt(Dh). */
  readonly scale: number;
  /** i32 [B, L] of document numbers, or null; needs Lk = L. A query sees only keys of its own number. */
  readonly seq_idx?: Tensor | null;
  /** Whether a query sees only keys up to its own position, as by default, or all of them. */
  readonly causal?: boolean;
  /** Which kernels compute it; default: those that suit the adapter. Teams need subgroups. */
  readonly kernel?: "team" | "tile";
}

interface Saved {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly out: Tensor;
  readonly lse: Tensor;
  readonly options: AttentionOptions;
  /** Dh as the caller knows it. */
  readonly width: number;
}

const TEAM_WG = 8; // invocations of a workgroup of teams
const TEAM_ROWS = 16;
const TILE_ROWS = 32; // rows of a workgroup tile
const DELTA_WG = 64;

/**
 * Two structures compute the same: teams of four or eight invocations with everything in their registers, for
 * adapters where loads and barriers are dear, and workgroup tiles, for GPUs and without subgroups.
 */
function plan(q: Tensor, k: Tensor, { scale, seq_idx, causal = true, kernel }: AttentionOptions) {
  const [batch, seqlen, nheads, Dh] = q.shape as [number, number, number, number];
  const [, kv_seqlen, nkv_heads] = k.shape as [number, number, number];
  const { info, hasSubgroups } = q.device;
  const tiled = !hasSubgroups || (kernel === undefined ? !info.isSoftware : kernel === "tile");
  const conditions = seq_idx ? ["seq_idx" as const] : [];
  const octo = info.subgroupMinSize === 8 && info.subgroupMaxSize === 8;
  const lanes = octo ? 8 : 4;
  const slabs = Math.ceil(Dh / (16 * lanes)); // parts of a head's width
  const constants = { HEAD_VEC4: Dh / 4 };
  const params = {
    batch, seqlen, kv_seqlen, nheads, nkv_heads, reach: causal ? kv_seqlen - seqlen : kv_seqlen, scale,
  };
  const workgroups = (rows: number, heads: number): [number] => {
    if (q.size === 0 || k.size === 0) return [0];
    if (tiled) return [batch * heads * Math.ceil(rows / TILE_ROWS)];
    return [Math.ceil((batch * heads * Math.ceil(rows / TEAM_ROWS) * slabs * lanes) / TEAM_WG)];
  };
  return {
    batch, seqlen, nheads,
    // Without the condition `seq_idx` the variable is bound but never read, so any tensor will do.
    seq_idx: seq_idx ?? q,
    tiled: tiled ? { params, constants, conditions } : null,
    byTeams: {
      params: { ...params, four: 4 }, constants: { ...constants, WG: TEAM_WG },
      conditions: ["subgroups" as const, ...octo ? ["octo" as const] : [], ...conditions],
    },
    forQueries: workgroups(seqlen, nheads),
    forKeys: workgroups(kv_seqlen, nkv_heads),
  };
}

function forward(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): { out: Tensor; lse: Tensor } {
  const { batch, nheads, seqlen, seq_idx, tiled, byTeams, forQueries: workgroups } = plan(q, k, options);
  const out = q.device.empty(q.shape);
  const lse = q.device.empty([batch, nheads, seqlen]);
  const bind = { q, k, v, out, lse, seq_idx };
  if (tiled) launch("attention/attention_tile", { bind, ...tiled, workgroups });
  else launch("attention/attention", { bind, ...byTeams, workgroups });
  return { out, lse };
}

function backward({ q, k, v, out, lse, options }: Saved, dout: Tensor, wants: { q: boolean; kv: boolean }) {
  const { seqlen, nheads, seq_idx, tiled, byTeams, forQueries, forKeys } = plan(q, k, options);
  const { device } = q;
  const total = lse.size;
  const stats = device.empty([total, 2]);
  launch("attention/attention_delta", {
    bind: { out, dout, lse, stats }, params: { seqlen, nheads, total },
    constants: { WG: DELTA_WG, HEAD_VEC4: q.shape[3]! / 4 },
    workgroups: [Math.ceil(total / DELTA_WG)],
  });
  let [dq, dk, dv]: (Tensor | null)[] = [null, null, null];
  if (wants.q) {
    dq = device.empty(q.shape);
    const bind = { q, k, v, dout, stats, dq, seq_idx };
    if (tiled) launch("attention/attention_tile_dq", { bind, ...tiled, workgroups: forQueries });
    else launch("attention/attention_dq", { bind, ...byTeams, workgroups: forQueries });
  }
  if (wants.kv) {
    // Keys without any query get zeros.
    dk = q.size === 0 ? device.zeros(k.shape) : device.empty(k.shape);
    dv = q.size === 0 ? device.zeros(v.shape) : device.empty(v.shape);
    const bind = { q, k, v, dout, stats, dk, dv, seq_idx };
    if (tiled) launch("attention/attention_tile_dkv", { bind, ...tiled, workgroups: forKeys });
    else launch("attention/attention_dkv", { bind, ...byTeams, workgroups: forKeys });
  }
  return { dq, dk, dv };
}

/** The last dimension widened to a multiple of four with zeros: a score gains nothing from them. */
function widened(x: Tensor): Tensor {
  const Dh = x.shape.at(-1)!;
  if (Dh % 4 === 0) return x;
  return resized(x, 4 * Math.ceil(Dh / 4));
}

function resized(x: Tensor, cols: number): Tensor {
  const Dh = x.shape.at(-1)!;
  if (Dh === cols) return x;
  const shape = [...x.shape.slice(0, -1), cols];
  const y = cols > Dh ? x.device.zeros(shape) : x.device.empty(shape);
  const rows = shape.slice(0, -1).reduce((a, b) => a * b, 1);
  copyColumns(rows, Math.min(Dh, cols), { tensor: x, cols: Dh, first: 0 }, { tensor: y, cols, first: 0 });
  return y;
}

/**
 * softmax(scale * q k^T) v, causal or over all keys, with grouped key and value heads; no L x Lk matrix is
 * ever in memory.
 *
 * @param q  f32 [B, L, Hq, Dh], Dh at most 256; query t is at absolute position t + (Lk - L)
 * @param k  f32 [B, Lk, Hkv, Dh], Lk >= L where causal, Hq a multiple of Hkv; v has the same shape. Query
 *   head h reads head floor(h / (Hq / Hkv))
 * @returns f32 [B, L, Hq, Dh]
 * @throws ShapeError for shapes that do not belong together
 *
 * Numerics  f32 throughout, online softmax; saves the log-sum-exp [B, Hq, L]. Sums have a fixed order.
 * Cost      2 B Hq L Lk Dh multiply-adds forward (half of it where causal with Lk = L), 3.5 times that
 * backward. Source    Dao 2023, FlashAttention-2 (arXiv 2307.08691).
 */
export const attention = defineOp({
  name: "attention",
  forward(ctx, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions): Tensor {
    check(q.shape.length === 4, "attention", "q", "[B, L, Hq, Dh]", q);
    const [B, L, Hq, Dh] = q.shape as [number, number, number, number];
    const [, Lk = 0, Hkv = 0] = k.shape;
    check(Dh <= 256, "attention", "the head width of q", "at most 256", q);
    const { seq_idx, causal = true } = options;
    check(
      k.shape.length === 4 && k.shape[0] === B && k.shape[3] === Dh && (Lk >= L || !causal), "attention", "k",
      `[${B}, ${causal ? `Lk >= ${L}` : "Lk"}, Hkv, ${Dh}]`, k,
    );
    check(v.shape.join() === k.shape.join(), "attention", "v", `[${k.shape.join(", ")}]`, v);
    const groups = Hkv > 0 ? Hq % Hkv === 0 : Hq === 0;
    check(groups, "attention", "the number of key heads", `a divisor of ${Hq}`, Hkv);
    if (seq_idx) {
      const fits = seq_idx.shape.join() === `${B},${L}` && Lk === L;
      check(fits, "attention", "seq_idx", `[${B}, ${Lk}] with Lk = L`, seq_idx);
    }
    const wide = { q: widened(q), k: widened(k), v: widened(v) };
    const { out, lse } = forward(wide.q, wide.k, wide.v, options);
    ctx.save({ ...wide, out, lse, options, width: Dh });
    return resized(out, Dh);
  },
  backward(saved: Saved, [dout], needs) {
    if (!dout) return [];
    const { dq, dk, dv } = backward(saved, widened(dout), { q: needs[0]!, kv: needs[1]! || needs[2]! });
    return [dq, dk, dv].map((gradient) => gradient && resized(gradient, saved.width));
  },
});
