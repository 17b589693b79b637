/**
 * Models as planners see them: layers by kind with their widths, their matrix products, parameters and
 * floating-point operations. Made from a Nemotron-H configuration, or given for published models.
 */
import { layerSpecs, mtpSpecs } from "../models/config.ts";
import type { LayerSpec, NemotronHConfig } from "../models/config.ts";

export type ShapeLayer =
  | { readonly kind: "attention"; readonly heads: number; readonly kvHeads: number; readonly headDim: number }
  /** Multi-head latent attention: queries and keys go through narrow projections first. */
  | {
    readonly kind: "latent_attention"; readonly heads: number; readonly queryRank: number;
    readonly keyRank: number; readonly headDim: number; readonly ropeDim: number; readonly valueDim: number;
  }
  | {
    readonly kind: "mamba"; readonly heads: number; readonly headDim: number; readonly groups: number;
    readonly state: number; readonly window: number; readonly chunk: number;
  }
  | { readonly kind: "mlp"; readonly width: number; readonly gated: boolean }
  | {
    readonly kind: "moe"; readonly experts: number; readonly topk: number; readonly width: number;
    readonly gated: boolean;
    /** Width in which tokens travel to experts and back, where that is not the hidden size. */
    readonly latent: number | null;
    /** Width of the shared expert; 0: none. */
    readonly shared: number;
  };

export interface ModelShape {
  readonly name: string;
  readonly hidden: number;
  readonly vocab: number;
  readonly layers: readonly ShapeLayer[];
  /** Layers that a pipeline cut keeps together: 2 for transformers, whose blocks are a pair. */
  readonly unit: 1 | 2;
  /** Layers of the block that predicts one more token; none where there is no such block. */
  readonly mtp: readonly ShapeLayer[];
  /** How often a training step passes that block; the passes share its weights. */
  readonly mtpDepths: number;
}

/** The shape of a Nemotron-H model. Equal layers are one object. */
export function shapeOf(config: NemotronHConfig, name: string): ModelShape {
  const known = new Map<string, ShapeLayer>();
  const shared = (layer: ShapeLayer): ShapeLayer => {
    const key = JSON.stringify(layer);
    if (!known.has(key)) known.set(key, layer);
    return known.get(key)!;
  };
  return {
    name, hidden: config.hidden_size, vocab: config.vocab_size, unit: 1,
    layers: layerSpecs(config).map((spec) => shared(shapeLayer(config, spec))),
    mtp: mtpSpecs(config).map((spec) => shared(shapeLayer(config, spec))),
    mtpDepths: config.num_nextn_predict_layers,
  };
}

function shapeLayer(config: NemotronHConfig, spec: LayerSpec): ShapeLayer {
  switch (spec.kind) {
    case "mamba":
      return {
        kind: "mamba", heads: config.mamba_num_heads, headDim: config.mamba_head_dim, groups: config.n_groups,
        state: config.ssm_state_size, window: config.conv_kernel, chunk: config.chunk_size,
      };
    case "attention":
      return {
        kind: "attention", heads: config.num_attention_heads, kvHeads: config.num_key_value_heads,
        headDim: config.head_dim,
      };
    case "mlp":
      return { kind: "mlp", width: spec.intermediate_size, gated: false };
    case "moe":
      return {
        kind: "moe", experts: spec.n_routed_experts, topk: spec.num_experts_per_tok,
        width: spec.moe_intermediate_size, gated: false, latent: spec.moe_latent_size,
        shared: spec.shared_size,
      };
  }
}

/** One linear layer. */
export interface Product {
  readonly out: number;
  readonly in: number;
  /** Cut over tp by its outputs or inputs, or whole on every rank; `expert`: over ep and etp. */
  readonly cut: "out" | "in" | "whole" | "expert_out" | "expert_in";
  /** How many there are: the experts of a layer. */
  readonly count: number;
  /** Of those, how many a token meets. */
  readonly met: number;
  /** What low-precision recipes make of it. */
  readonly role: ProductRole;
}

/**
 * `linear`: in the recipe's format; `attention`: in 16 bits where the recipe has 4; `mamba_out`: in 8 bits
 * there; `high`: always in 16 bits, as routers, latent projections and heads. So does the report of
 * Nemotron 3 Super.
 */
export type ProductRole = "linear" | "attention" | "mamba_out" | "high";

/** The products of a layer. Query, key and value projections are one. */
export function productsOf(hidden: number, layer: ShapeLayer): Product[] {
  const one = { count: 1, met: 1, role: "linear" } as const;
  switch (layer.kind) {
    case "attention": {
      const { heads, kvHeads, headDim } = layer;
      return [
        { out: (heads + 2 * kvHeads) * headDim, in: hidden, cut: "out", ...one, role: "attention" },
        { out: hidden, in: heads * headDim, cut: "in", ...one, role: "attention" },
      ];
    }
    case "latent_attention": {
      const { heads, queryRank, keyRank, headDim, ropeDim, valueDim } = layer;
      return [
        { out: queryRank, in: hidden, cut: "whole", ...one, role: "attention" },
        { out: heads * (headDim + ropeDim), in: queryRank, cut: "out", ...one, role: "attention" },
        { out: keyRank + ropeDim, in: hidden, cut: "whole", ...one, role: "attention" },
        { out: heads * (headDim + valueDim), in: keyRank, cut: "out", ...one, role: "attention" },
        { out: hidden, in: heads * valueDim, cut: "in", ...one, role: "attention" },
      ];
    }
    case "mamba": {
      const { heads, headDim, groups, state } = layer;
      const inner = heads * headDim;
      return [
        { out: 2 * inner + 2 * groups * state + heads, in: hidden, cut: "out", ...one },
        { out: hidden, in: inner, cut: "in", ...one, role: "mamba_out" },
      ];
    }
    case "mlp":
      return [
        { out: layer.width * (layer.gated ? 2 : 1), in: hidden, cut: "out", ...one },
        { out: hidden, in: layer.width, cut: "in", ...one },
      ];
    case "moe": {
      const { experts, topk, width, gated, latent, shared } = layer;
      const wide = gated ? 2 : 1;
      const input = latent ?? hidden;
      const all = { count: experts, met: topk, role: "linear" } as const;
      const high = { ...one, role: "high" } as const;
      return [
        { out: experts, in: hidden, cut: "whole", ...high },
        ...(latent === null ? [] : [
          { out: latent, in: hidden, cut: "whole", ...high } as const,
          { out: hidden, in: latent, cut: "whole", ...high } as const,
        ]),
        { out: width * wide, in: input, cut: "expert_out", ...all },
        { out: input, in: width, cut: "expert_in", ...all },
        ...(shared === 0 ? [] : [
          { out: shared * wide, in: hidden, cut: "out", ...one } as const,
          { out: hidden, in: shared, cut: "in", ...one } as const,
        ]),
      ];
    }
  }
}

/** Parameters by where they lie: cut over tp, whole on every rank of tp, cut over ep and etp. */
export interface ParameterShares {
  readonly cut: number;
  readonly whole: number;
  readonly expert: number;
}

const knownShares = new WeakMap<ShapeLayer, { readonly hidden: number; readonly shares: ParameterShares }>();

/** Parameters of a layer, norms and convolutions with it. */
export function layerShares(hidden: number, layer: ShapeLayer): ParameterShares {
  const known = knownShares.get(layer);
  if (known?.hidden === hidden) return known.shares;
  const shares = countShares(hidden, layer);
  knownShares.set(layer, { hidden, shares });
  return shares;
}

function countShares(hidden: number, layer: ShapeLayer): ParameterShares {
  // The norm before the layer; what Mamba-2 has beside its projections is cut by heads.
  let [cut, whole, expert] = [0, hidden, 0];
  for (const product of productsOf(hidden, layer)) {
    const size = product.out * product.in * product.count;
    if (product.cut === "whole") whole += size;
    else if (product.cut === "out" || product.cut === "in") cut += size;
    else expert += size;
  }
  if (layer.kind === "mamba") {
    const { heads, headDim, groups, state, window } = layer;
    cut += (heads * headDim + 2 * groups * state) * (window + 1) + 3 * heads + heads * headDim;
  }
  if (layer.kind === "latent_attention") whole += layer.queryRank + layer.keyRank;
  if (layer.kind === "moe") whole += layer.experts;
  return { cut, whole, expert };
}

/** Parameters of the prediction block: its layers, the projection that joins its inputs, three norms. */
export function mtpShares({ hidden, mtp }: ModelShape): ParameterShares {
  if (mtp.length === 0) return { cut: 0, whole: 0, expert: 0 };
  const join = { cut: 0, whole: 2 * hidden * hidden + 3 * hidden, expert: 0 };
  return addShares([join, ...mtp.map((layer) => layerShares(hidden, layer))]);
}

export function addShares(list: Iterable<ParameterShares>): ParameterShares {
  let [cut, whole, expert] = [0, 0, 0];
  for (const shares of list) {
    cut += shares.cut;
    whole += shares.whole;
    expert += shares.expert;
  }
  return { cut, whole, expert };
}

/** All parameters, embedding, head and prediction block included. */
export function shapeParameters(shape: ModelShape): number {
  const { cut, whole, expert } = addShares([
    mtpShares(shape), ...shape.layers.map((layer) => layerShares(shape.hidden, layer)),
  ]);
  return cut + whole + expert + 2 * shape.vocab * shape.hidden + shape.hidden;
}

/**
 * Floating-point operations of forward and backward pass per token, three times those of the forward pass:
 * products with the experts that a token meets, causal attention counted as half the square, 7 for every
 * number of a recurrent state, prediction block and its head included. That is how the published rates
 * count, which krait plan compares with.
 */
export function trainingFlops(shape: ModelShape, seqlen: number): number {
  const { hidden, vocab, layers, mtp, mtpDepths } = shape;
  const flops = (list: readonly ShapeLayer[]) =>
    list.reduce((sum, layer) => sum + layerFlops(hidden, layer, seqlen), 0);
  const head = 2 * vocab * hidden;
  const join = 2 * 2 * hidden * hidden;
  return 3 * (flops(layers) + head + mtpDepths * (flops(mtp) + join + head));
}

/** Forward operations of a layer per token. */
export function layerFlops(hidden: number, layer: ShapeLayer, seqlen: number): number {
  const products = productsOf(hidden, layer)
    .reduce((sum, product) => sum + 2 * product.out * product.in * product.met, 0);
  return products + mixingFlops(layer, seqlen);
}

/** What attention or the scan adds to a layer's products, per token. */
export function mixingFlops(layer: ShapeLayer, seqlen: number): number {
  switch (layer.kind) {
    case "attention":
      return 2 * seqlen * layer.heads * layer.headDim;
    case "latent_attention":
      return seqlen * layer.heads * (layer.headDim + layer.ropeDim + layer.valueDim);
    case "mamba":
      return 7 * layer.heads * layer.headDim * layer.state;
    default:
      return 0;
  }
}

/** How often each layer stands in a list. */
export function countEqual(layers: Iterable<ShapeLayer>): Map<ShapeLayer, number> {
  const counts = new Map<ShapeLayer, number>();
  for (const layer of layers) counts.set(layer, (counts.get(layer) ?? 0) + 1);
  return counts;
}
