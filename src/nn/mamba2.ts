import { recompute } from "../autograd/recompute.ts";
import { causal_conv1d, causal_conv1d_update } from "../ops/causal_conv1d.ts";
import { split_columns } from "../ops/elementwise.ts";
import { gated_rms_norm } from "../ops/gated_rms_norm.ts";
import { linear } from "./product.ts";
import { enter, rowLinear } from "./tensor_parallel.ts";
import { selective_state_update } from "../ops/selective_state_update.ts";
import { ssd_scan } from "../ops/ssd_scan.ts";
import type { Device } from "../tensor/device.ts";
import { promote } from "../tensor/scope.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type ForwardContext, recomputes, type Step } from "./context.ts";
import { checkWholeRows, type ScanInputs, scanOverRanks, type ScanSizes } from "./context_parallel.ts";
import { type Division, SOLO } from "./division.ts";
import type { Weight, Weights } from "./weights.ts";

/** Heads and groups are those of a rank: the layer's over `Division.tp`. */
export interface Mamba2Sizes {
  readonly hidden: number;
  readonly nheads: number;
  readonly headdim: number;
  readonly dstate: number;
  readonly ngroups: number;
  readonly conv_kernel: number;
  readonly chunk_size: number;
  /** Bounds of dt after softplus. */
  readonly dt_limit: readonly [number, number];
  readonly eps: number;
  readonly conv_bias: boolean;
  readonly proj_bias: boolean;
}

/** Recurrent state of one layer, constant in the sequence length. */
export interface Mamba2Cache {
  readonly kind: "mamba2";
  /** (batch, conv channels, window): the last inputs of the convolution, oldest first. */
  readonly conv_state: Tensor;
  /** (batch, heads, headdim, dstate) */
  readonly ssm_state: Tensor;
  /** Kept by a verification pass for `commit`: inputs of the convolution and of the scan. */
  pending: { xBC: Tensor; x: Tensor; dt: Tensor; B: Tensor; C: Tensor } | null;
}

/**
 * Mamba-2 mixer: in_proj, causal conv + SiLU, SSD scan, gated group RMSNorm, out_proj.
 * Dao & Gu 2024, section 7.
 */
export class Mamba2 {
  readonly sizes: Mamba2Sizes;
  readonly division: Division;
  readonly in_proj: Weight;
  readonly in_proj_bias: Tensor | null;
  /** (conv channels, 1, window) */
  readonly conv1d: Tensor;
  readonly conv_bias: Tensor | null;
  readonly A_log: Tensor;
  readonly D: Tensor;
  readonly dt_bias: Tensor;
  readonly norm: Tensor;
  readonly out_proj: Weight;
  readonly out_proj_bias: Tensor | null;

  constructor(sizes: Mamba2Sizes, w: Weights, division: Division = SOLO) {
    const { hidden, nheads: H, headdim: P, dstate: N, ngroups: G, conv_kernel: W } = sizes;
    const d_inner = H * P;
    const conv_dim = d_inner + 2 * G * N;
    this.sizes = sizes;
    this.division = division;
    this.in_proj = w.takeWeight("in_proj.weight", [d_inner + conv_dim + H, hidden]);
    this.in_proj_bias = sizes.proj_bias ? w.take("in_proj.bias", [d_inner + conv_dim + H]) : null;
    this.conv1d = w.take("conv1d.weight", [conv_dim, 1, W]);
    this.conv_bias = sizes.conv_bias ? w.take("conv1d.bias", [conv_dim]) : null;
    this.A_log = w.take("A_log", [H]);
    this.D = w.take("D", [H]);
    this.dt_bias = w.take("dt_bias", [H]);
    this.norm = w.take("norm.weight", [d_inner]);
    this.out_proj = w.takeWeight("out_proj.weight", [hidden, d_inner]);
    this.out_proj_bias = sizes.proj_bias ? w.take("out_proj.bias", [hidden]) : null;
  }

  /** @throws UsageError where ranks share the positions of a row */
  createCache(device: Device, batch: number): Mamba2Cache {
    checkWholeRows(this.division);
    const { nheads: H, headdim: P, dstate: N, ngroups: G, conv_kernel: W } = this.sizes;
    return {
      kind: "mamba2",
      conv_state: device.zeros([batch, H * P + 2 * G * N, W]),
      ssm_state: device.zeros([batch, H, P, N]),
      pending: null,
    };
  }

  get #convWeight(): Tensor {
    const [channels, , window] = this.conv1d.shape as [number, number, number];
    return this.conv1d.reshape([channels, window]);
  }

  get #perHead(): { A_log: Tensor; D: Tensor; dt_bias: Tensor } {
    const { A_log, D, dt_bias } = this;
    return { A_log, D, dt_bias };
  }

  /**
   * (batch, seqlen, hidden) -> (batch, seqlen, hidden), added to `residual`;
   * with a cache the run continues from it and leaves its end there.
   */
  forward(
    own_BLD: Tensor, context: ForwardContext, cache: Mamba2Cache | null, residual: Tensor | null = null,
  ): Tensor {
    const { nheads: H, headdim: P, dstate: N, ngroups: G } = this.sizes;
    const u_BLD = enter(own_BLD, this.division);
    const [B, L] = u_BLD.shape as [number, number, number];
    const d_inner = H * P;
    const conv_dim = d_inner + 2 * G * N;
    const proj = linear(u_BLD, this.in_proj, this.in_proj_bias);
    const [z, xBC, dt] = split_columns(proj, [d_inner, conv_dim, H]) as [Tensor, Tensor, Tensor];
    const { seq_idx, step } = context;
    const inner = ([gate, channels, steps]: readonly [Tensor, Tensor, Tensor]) => {
      const y = cache && step?.decode
        ? this.#decode(channels.reshape([B, conv_dim]), steps.reshape([B, H]), cache)
        : scanOverRanks({
          xBC: channels, dt: steps, seq_idx, conv_weight: this.#convWeight, conv_bias: this.conv_bias,
          ...this.#perHead,
        }, this.sizes, this.division, (inputs, sizes) => this.#scan(inputs, sizes, step, cache));
      return gated_rms_norm(y.reshape([B, L, d_inner]), gate, this.norm, G, this.sizes.eps);
    };
    const read = [z, xBC, dt] as const;
    const [normed] = recomputes(context, "mamba")
      ? recompute(seq_idx ? [...read, seq_idx] : read, (_, [gate, channels, steps]) =>
        [inner([gate!, channels!, steps!])]) as [Tensor]
      : [inner(read)];
    return rowLinear(normed, this.out_proj, this.out_proj_bias, residual, this.division);
  }

  /** Takes the first `length` tokens of the last verification pass into the cache (batch 1 only). */
  commit(length: number, cache: Mamba2Cache): void {
    const { pending } = cache;
    if (!pending) throw new Error("Mamba2.commit: no verification pass came before.");
    const first = (x: Tensor) => x.prefix([1, length, ...x.shape.slice(2)]);
    const [, conv_state] = causal_conv1d(
      first(pending.xBC), this.#convWeight, this.conv_bias, cache.conv_state, null) as [Tensor, Tensor];
    const [, ssm_state] = this.#ssd(
      first(pending.x), first(pending.B), first(pending.C),
      { dt: first(pending.dt), seq_idx: null, ...this.#perHead }, cache.ssm_state);
    cache.conv_state.copyFrom(conv_state);
    cache.ssm_state.copyFrom(ssm_state);
  }

  #scan(inputs: ScanInputs, sizes: ScanSizes, step: Step | null, cache: Mamba2Cache | null): Tensor {
    const { nheads: H, headdim: P, dstate: N, ngroups: G } = sizes;
    const { xBC, dt, seq_idx, conv_weight, conv_bias } = inputs;
    const [B, L] = xBC.shape as [number, number, number];
    const [conv, conv_state] = causal_conv1d(
      xBC, conv_weight, conv_bias, cache && cache.conv_state, seq_idx, cache !== null,
    ) as [Tensor, Tensor | undefined];
    const [x, Bmat, C] = split_columns(conv, [H * P, G * N, G * N]) as [Tensor, Tensor, Tensor];
    const x_BLHP = x.reshape([B, L, H, P]);
    const B_BLGN = Bmat.reshape([B, L, G, N]);
    const C_BLGN = C.reshape([B, L, G, N]);
    const [y, ssm_state] = this.#ssd(x_BLHP, B_BLGN, C_BLGN, inputs, cache && cache.ssm_state);
    if (cache && step?.verify) {
      cache.pending = promote({ xBC, x: x_BLHP, dt, B: B_BLGN, C: C_BLGN });
    } else if (cache) {
      cache.conv_state.copyFrom(conv_state!);
      cache.ssm_state.copyFrom(ssm_state);
    }
    return y;
  }

  #ssd(
    x: Tensor, B: Tensor, C: Tensor,
    { dt, A_log, D, dt_bias, seq_idx }: Pick<ScanInputs, "dt" | "A_log" | "D" | "dt_bias" | "seq_idx">,
    initial_state: Tensor | null,
  ): readonly [Tensor, Tensor] {
    const { chunk_size, dt_limit } = this.sizes;
    return ssd_scan(x, dt, A_log, B, C, D, dt_bias, { chunk_size, dt_limit, initial_state, seq_idx });
  }

  #decode(xBC: Tensor, dt: Tensor, cache: Mamba2Cache): Tensor {
    const conv = causal_conv1d_update(cache.conv_state, xBC, this.#convWeight, this.conv_bias);
    return selective_state_update(
      cache.ssm_state, conv, dt, this.A_log, this.D, this.dt_bias, this.sizes.dt_limit);
  }
}
