import { recompute } from "../autograd/recompute.ts";
import { cache_read, cache_write, decode_attention } from "../ops/decode_attention.ts";
import { linear } from "./product.ts";
import { enter, rowLinear } from "./tensor_parallel.ts";
import type { Device } from "../tensor/device.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { type ForwardContext, recomputes } from "./context.ts";
import { attendOverRanks, checkWholeRows } from "./context_parallel.ts";
import { type Division, SOLO } from "./division.ts";
import type { Weight, Weights } from "./weights.ts";

/** Heads are those of a rank: the layer's over `Division.tp`, and at least one key head. */
export interface AttentionSizes {
  readonly hidden: number;
  readonly num_attention_heads: number;
  readonly num_key_value_heads: number;
  readonly head_dim: number;
  readonly bias: boolean;
}

/** What the codes of keys and values in FP8 are multiplied with. */
export interface KVScales {
  readonly key: number;
  readonly value: number;
}

/** Keys and values of past tokens: (batch, kv heads, capacity, head_dim) each. */
export interface KVCache {
  readonly kind: "kv";
  readonly key: Tensor;
  readonly value: Tensor;
  /** With scales the tensors hold E4M3 codes, four to a word. */
  readonly scales: KVScales | null;
}

/** Grouped-query causal attention without positional encoding. */
export class Attention {
  readonly sizes: AttentionSizes;
  readonly division: Division;
  readonly path: string;
  readonly q_proj: Weight;
  readonly k_proj: Weight;
  readonly v_proj: Weight;
  readonly o_proj: Weight;
  readonly biases: { q: Tensor; k: Tensor; v: Tensor; o: Tensor } | null;

  constructor(sizes: AttentionSizes, w: Weights, division: Division = SOLO) {
    const { hidden: D, num_attention_heads: Hq, num_key_value_heads: Hkv, head_dim: Dh } = sizes;
    this.sizes = sizes;
    this.division = division;
    this.path = w.path;
    this.q_proj = w.takeWeight("q_proj.weight", [Hq * Dh, D]);
    this.k_proj = w.takeWeight("k_proj.weight", [Hkv * Dh, D]);
    this.v_proj = w.takeWeight("v_proj.weight", [Hkv * Dh, D]);
    this.o_proj = w.takeWeight("o_proj.weight", [D, Hq * Dh]);
    this.biases = sizes.bias
      ? {
        q: w.take("q_proj.bias", [Hq * Dh]), k: w.take("k_proj.bias", [Hkv * Dh]),
        v: w.take("v_proj.bias", [Hkv * Dh]), o: w.take("o_proj.bias", [D]),
      }
      : null;
  }

  /**
   * @param scales for keys and values in FP8; null: f32
   * @throws UsageError for codes that do not fill whole words, and where ranks share the positions of a row
   */
  createCache(device: Device, batch: number, capacity: number, scales: KVScales | null = null): KVCache {
    checkWholeRows(this.division);
    const { num_key_value_heads: Hkv, head_dim: Dh } = this.sizes;
    if (scales && Dh % 4 !== 0) {
      throw new UsageError(
        `An FP8 cache needs heads of a multiple of 4 numbers, found ${Dh} in ${this.path}.`);
    }
    const make = () => scales ? device.zeros([batch, Hkv, capacity, Dh / 4], "u32")
      : device.zeros([batch, Hkv, capacity, Dh]);
    return { kind: "kv", key: make(), value: make(), scales };
  }

  /**
   * (batch, seqlen, hidden) -> (batch, seqlen, hidden), added to `residual`;
   * with a cache the keys and values of this call are added to it.
   */
  forward(
    own_BLD: Tensor, context: ForwardContext, cache: KVCache | null, residual: Tensor | null = null,
  ): Tensor {
    const { num_attention_heads: Hq, num_key_value_heads: Hkv, head_dim: Dh } = this.sizes;
    const x_BLD = enter(own_BLD, this.division);
    const [B, L] = x_BLD.shape as [number, number, number];
    const { biases } = this;
    const scale = 1 / Math.sqrt(Dh);
    const q = linear(x_BLD, this.q_proj, biases && biases.q).reshape([B, L, Hq, Dh]);
    let k = linear(x_BLD, this.k_proj, biases && biases.k).reshape([B, L, Hkv, Dh]);
    let v = linear(x_BLD, this.v_proj, biases && biases.v).reshape([B, L, Hkv, Dh]);
    let out: Tensor;
    const { step } = context;
    const [kScale, vScale] = cache?.scales ? [cache.scales.key, cache.scales.value] : [null, null];
    if (cache && step) {
      cache_write(cache.key, k, step.position, kScale);
      cache_write(cache.value, v, step.position, vScale);
    }
    if (cache && (step?.decode || step?.verify)) {
      out = decode_attention(q, cache.key, cache.value, step.position, scale, kScale, vScale);
    } else {
      // In FP8 a token's own keys are read back as well: what is computed does not depend on the pieces.
      if (cache && step && (step.length > 0 || cache.scales)) {
        k = cache_read(cache.key, step.length + L, kScale);
        v = cache_read(cache.value, step.length + L, vScale);
      }
      const { seq_idx } = context;
      const attend = ([a, b, c]: readonly Tensor[]) =>
        attendOverRanks(a!, b!, c!, { scale, seq_idx }, this.division);
      [out] = recomputes(context, "core_attn")
        ? recompute(seq_idx ? [q, k, v, seq_idx] : [q, k, v], (_, inputs) => [attend(inputs)]) as [Tensor]
        : [attend([q, k, v])];
    }
    return rowLinear(out.reshape([B, L, Hq * Dh]), this.o_proj, biases && biases.o, residual, this.division);
  }
}
