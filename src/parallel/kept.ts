/**
 * What the backward pass of each kind of layer reads, tensor by tensor, of one rank and one micro-batch: what
 * Krait's own kernels keep, and what published kernels do, which fuse more and gather again instead of
 * keeping what was gathered. Most of it both keep.
 */
import type { ContextKind, DispatcherKind } from "../nn/division.ts";
import type { StepSizes } from "./layout.ts";
import type { ModelShape, ShapeLayer } from "./model_shape.ts";

/** What the memory of a layout depends on: a Layout has these. */
export interface MemoryLayout {
  readonly tp: number;
  readonly cp: number;
  readonly dp: number;
  readonly pp: number;
  readonly ep: number;
  readonly etp: number;
  readonly edp: number;
  readonly vpp: number;
  readonly sp: boolean;
  readonly cp_kind?: ContextKind;
  readonly dispatcher?: DispatcherKind;
  readonly micro_batch_group?: number;
  readonly overlap?: boolean;
  readonly expert_budget?: number | null;
}

/** A run on Krait, as far as its kernels keep other things by it. */
export interface KraitKernels {
  /** How Mamba-2 scans: see `ssd_scan`. */
  readonly scan: "walk" | "chunks";
  /** Where experts' weights are multiplied in: see `MoETraining`. */
  readonly weighing: "output" | "activation";
  /** Routers have a balancing loss. */
  readonly balanced: boolean;
}

/** Parts of a rank's activations. */
export type ActivationPart =
  "mamba" | "attention" | "mlp" | "router" | "experts" | "shared" | "embedding" | "head";

/** One tensor, or a few alike. */
export interface Kept {
  readonly part: ActivationPart;
  readonly numbers: number;
  /**
   * `exact`: of 4 bytes each, whatever the run; `product`: of the width of what products read. Otherwise of
   * the width of activations.
   */
  readonly as?: "exact" | "product";
  /** Gone where one of these is recomputed: modules of `parseRecompute`, and two of published kernels. */
  readonly again?: readonly string[];
  /** There only where this one is recomputed. */
  readonly instead?: string;
  /** The residual stream, which whole layers that are recomputed start from. */
  readonly stream?: true;
  /** What a recomputed layer must not choose anew, or others read. */
  readonly stays?: true;
}

/** Tokens of a rank in a micro-batch: of the sequence's part under cp, and of that the part under tp. */
export function tokensOf({ tp, cp, sp }: MemoryLayout, { batch, seqlen }: StepSizes) {
  const whole = (batch * seqlen) / cp;
  return { whole, cut: sp ? whole / tp : whole };
}

interface Place {
  readonly hidden: number;
  readonly layout: MemoryLayout;
  readonly sizes: StepSizes;
  /** Null: published kernels. */
  readonly krait: KraitKernels | null;
}

type Of<K extends ShapeLayer["kind"]> = Extract<ShapeLayer, { kind: K }>;

/** All that a layer keeps. */
export function keptBy(layer: ShapeLayer, place: Place): Kept[] {
  switch (layer.kind) {
    case "attention": return [...entered("attention", place), ...attention(layer, place)];
    case "latent_attention": return [...entered("attention", place), ...latentAttention(layer, place)];
    case "mamba": return [...entered("mamba", place), ...mamba(layer, place)];
    case "mlp": {
      const { layout: { tp } } = place;
      const width = tokensOf(place.layout, place.sizes).whole * (layer.width / tp);
      return [
        ...entered("mlp", place, "mlp"), ...activated("mlp", width, layer.gated, ["mlp"], place),
      ];
    }
    case "moe": return experts(layer, place);
  }
}

/**
 * The residual stream and the norm behind it, and what products read of it: under sequence parallelism all
 * positions, which Krait keeps.
 * @param module which is recomputed as a whole from the norm's output
 */
function entered(part: ActivationPart, { hidden, layout, sizes, krait }: Place, module?: string): Kept[] {
  const { whole, cut } = tokensOf(layout, sizes);
  const normed: Kept = { part, numbers: cut * hidden, as: "product", again: ["layernorm"] };
  const stream: Kept = { part, numbers: cut * hidden, stream: true };
  if (!krait) return [stream, normed];
  const rstd: Kept = { part, numbers: cut, as: "exact", again: ["layernorm"] };
  if (whole === cut) return [stream, normed, rstd];
  return [
    stream, rstd, { part, numbers: whole * hidden, ...(module ? { again: [module] } : {}) },
    ...(module ? [{ ...normed, instead: module }] : []),
  ];
}

/** Outputs of the first product of an MLP and of its activation. max(h, 0)^2 is all that Krait keeps. */
function activated(
  part: ActivationPart, numbers: number, gated: boolean, again: readonly string[], { krait }: Place,
): Kept[] {
  if (krait) return [{ part, numbers, again }];
  return [
    { part, numbers: numbers * (gated ? 2 : 1), again },
    { part, numbers, as: "product", again: [...again, "activations"] },
  ];
}

function attention({ heads, kvHeads, headDim }: Of<"attention">, { layout, sizes, krait }: Place): Kept[] {
  const part = "attention";
  const { tp, cp, cp_kind = "ring" } = layout;
  const { whole } = tokensOf(layout, sizes);
  const [own, keys] = [heads / tp, Math.max(kvHeads / tp, 1)];
  const queries = whole * own * headDim;
  const values = 2 * whole * keys * headDim;
  const lse: Kept = { part, numbers: whole * own, as: "exact", again: ["core_attn"] };
  if (!krait) return [{ part, numbers: 2 * queries + values }, { ...lse, again: [] }];
  // Heads whose width is no multiple of 4 are filled up; what the products gave is not kept then.
  const wide = 4 * Math.ceil(headDim / 4) / headDim;
  const inner = (numbers: number): Kept => ({ part, numbers, again: ["core_attn"] });
  const local: Kept[] = [
    { part, numbers: queries + values, instead: "core_attn" }, { part, numbers: queries },
  ];
  const numbered = (ranks: number): Kept =>
    ({ part, numbers: cp === 1 ? 0 : ranks * whole, as: "exact", again: ["core_attn"] });
  const copied = wide > 1 ? [inner(wide * queries)] : [];
  // Ranks that exchange positions for heads first.
  const near = cp === 1 ? 1 : cp_kind === "alltoall" ? cp : cp_kind === "hierarchical" ? common(cp, keys) : 1;
  const seen = cp_kind === "allgather" ? cp : near * Math.max(keys / near, 1) / keys;
  return [
    ...local, lse, inner(wide * (queries + (cp === 1 ? 1 : seen) * values)),
    ...(near > 1 ? [inner(wide * queries)] : copied),
    numbered(cp_kind === "allgather" ? cp + 1 : cp),
  ];
}

function common(a: number, b: number): number {
  return b === 0 ? a : common(b, a % b);
}

function latentAttention(layer: Of<"latent_attention">, { layout, sizes }: Place): Kept[] {
  const { heads, queryRank, keyRank, headDim, ropeDim, valueDim } = layer;
  const part = "attention";
  const { whole, cut } = tokensOf(layout, sizes);
  const own = heads / layout.tp;
  const [query, value] = [own * (headDim + ropeDim), own * valueDim];
  return [
    { part, numbers: cut * (queryRank + keyRank + ropeDim) * 2 },
    { part, numbers: whole * (2 * query + value), again: ["mla_up_proj"] },
    { part, numbers: whole * value }, { part, numbers: whole * own, as: "exact" },
  ];
}

function mamba(layer: Of<"mamba">, { layout, sizes, krait }: Place): Kept[] {
  const part = "mamba";
  const { tp, cp } = layout;
  const { whole } = tokensOf(layout, sizes);
  const { state, window, chunk } = layer;
  const [heads, groups] = [layer.heads / tp, layer.groups / tp];
  const inner = heads * layer.headDim;
  const channels = inner + 2 * groups * state;
  if (!krait) {
    // Projected inputs, convolved channels, chunk states, the scan's output, the gated norm's output.
    const each = inner + channels + heads + channels + (inner * state) / chunk + inner;
    return [
      { part, numbers: whole * each },
      { part, numbers: whole * inner, as: "product", again: ["activations"] },
    ];
  }
  // Under cp a rank scans whole rows of some heads, with the groups that they read.
  const scanned = { heads: heads / cp, groups: Math.max(groups / cp, 1) };
  const columns = (scanned.heads * inner) / heads + 2 * scanned.groups * state;
  const again = ["mamba"];
  const local: Kept = { part, numbers: whole * (channels + heads) };
  const outside: Kept[] = cp === 1 ? [local] : [
    { ...local, instead: "mamba" }, { part, numbers: whole * cp * (columns + scanned.heads), again },
    { part, numbers: whole * cp + columns * (window + 1) + 3 * scanned.heads, as: "exact", again },
  ];
  const rows = sizes.batch;
  const chunks = Math.ceil(sizes.seqlen / chunk);
  const steps = krait.scan === "walk"
    ? rows * scanned.heads * 4 * (1 + 2 * Math.ceil(sizes.seqlen / 4))
    // Time steps, their sums and three weights; chunk states; products of C and B; what states give.
    : rows * chunks * (5 * scanned.heads * chunk + (scanned.heads * inner * state) / heads
      + scanned.groups * chunk * chunk + 2 * chunk) + whole * inner;
  return [
    ...outside, { part, numbers: whole * inner }, // the gate
    { part, numbers: whole * cp * columns, again }, { part, numbers: steps, again },
    { part, numbers: whole * (inner + groups), again }, { part, numbers: whole * inner },
  ];
}

function experts(layer: Of<"moe">, place: Place): Kept[] {
  const { hidden, layout, sizes, krait } = place;
  const { topk, gated, latent, shared } = layer;
  const { whole, cut } = tokensOf(layout, sizes);
  const { tp, etp } = layout;
  const width = layer.width / etp;
  const input = latent ?? hidden;
  const again = ["moe"];
  const stream: Kept = { part: "router", numbers: cut * hidden, stream: true };
  const normed: Kept = { part: "router", numbers: cut * hidden, as: "product", again: ["layernorm"] };
  const ownShared = whole * (shared / tp);
  if (!krait) {
    const rows = cut * topk * etp;
    return [
      // Scores and choices; tokens in latent space before and after.
      stream, normed, { part: "router", numbers: cut * layer.experts * 2, as: "exact", again },
      { part: "router", numbers: latent === null ? 0 : 2 * cut * latent, again },
      { part: "experts", numbers: rows * input, as: "product", again },
      { part: "experts", numbers: rows * 2, as: "exact", again },
      ...activated("experts", rows * width, gated, again, place),
      ...activated("shared", ownShared, gated, again, place),
    ];
  }
  const logits: Kept = { part: "router", numbers: cut * layer.experts, as: "exact" };
  return [
    stream, normed, { part: "router", numbers: cut, as: "exact", again: ["layernorm"] },
    ...(krait.balanced
      ? [{ ...logits, numbers: cut * (layer.experts + 3), stays: true as const }] : [{ ...logits, again }]),
    { part: "router", numbers: cut * topk, as: "exact", stays: true },
    { part: "router", numbers: latent === null ? 0 : cut * latent, again }, // read by the last projection
    ...routed(layer, input, width, cut, krait, layout),
    ...(shared > 0 && whole !== cut
      ? [{ part: "shared", numbers: whole * hidden, again: [...again, "shared_experts"] } as const] : []),
    ...activated("shared", ownShared, gated, [...again, "shared_experts"], place),
  ];
}

/** Rows of experts and the tables by which they go there: Krait's have room for the most that can come. */
function routed(
  { experts: E, topk, latent }: Of<"moe">, input: number, width: number, tokens: number,
  { weighing }: KraitKernels, { ep, etp, dispatcher = "alltoall", expert_budget }: MemoryLayout,
): Kept[] {
  const part = "experts";
  const again = ["moe"];
  const kept = (numbers: number): Kept => ({ part, numbers, again });
  const table = (numbers: number): Kept => ({ part, numbers, as: "exact", again });
  const isWeighed = weighing === "activation";
  /** Hidden units, and what the second product reads or gives. */
  const rowsOf = (rows: number, results: number): Kept[] => [
    { part, numbers: rows * width, again: ["moe", "moe_act"] },
    kept(isWeighed ? rows * width : results * input),
  ];
  const own = E / ep;
  const choices = tokens * topk;
  const room = (most: number) => Math.min(most, Math.ceil((expert_budget ?? Infinity) * choices * etp));
  if (ep * etp === 1) {
    return [
      ...(latent === null ? [] : [kept(tokens * latent)]), table(3 * choices + E + 1),
      ...rowsOf(choices, choices),
    ];
  }
  if (dispatcher === "allgather") {
    const all = tokens * ep * etp;
    const rows = room(all * Math.min(topk, own));
    return [kept(all * input), table(2 * all * topk + rows), ...rowsOf(rows, rows)];
  }
  if (dispatcher === "flex") {
    const sends = tokens * Math.min(topk, ep);
    const all = room(tokens * ep * etp);
    const rows = room(all * Math.min(topk, own));
    return [
      kept(all * input), table(sends * (1 + etp) + choices + all * (1 + 2 * topk) + rows),
      ...rowsOf(rows, rows),
    ];
  }
  const worst = ep === 1 ? choices : ep * tokens * Math.min(topk, own);
  const rows = room(worst * etp);
  const most = Math.min(worst, rows);
  return [
    kept(rows * input),
    // Slots of choices and their weights, and by which rows go and come back.
    table(3 * choices + (ep > 1 ? choices + most : 0) + (etp > 1 ? rows + most * etp : 0)),
    ...(isWeighed ? [table(3 * rows)] : []), ...rowsOf(rows, choices),
  ];
}

/** What a chunk keeps around its layers, Krait's way. */
export interface ChunkEnds {
  /** The final norm. */
  readonly norm: boolean;
  readonly mtp: boolean;
  readonly head: boolean;
}

/** What the final norm, the prediction block's own parts and the head keep. */
export function keptAround({ norm, mtp, head }: ChunkEnds, shape: ModelShape, place: Place): Kept[] {
  const { hidden, vocab, mtpDepths: depths } = shape;
  const { layout, sizes } = place;
  const { whole, cut } = tokensOf(layout, sizes);
  const part = "head";
  const own = vocab / layout.tp;
  const list: Kept[] = [];
  const exact = (numbers: number) => list.push({ part, numbers, as: "exact" });
  const kept = (numbers: number) => list.push({ part, numbers });
  if (norm) {
    kept(cut * hidden); // its input
    exact(cut);
  }
  if (mtp) {
    // Of every depth the embedded tokens and what is joined with them, and the last norm's input.
    kept(depths * cut * hidden * (1 + 2 + 1));
    exact(depths * cut * 3);
    if (!head || whole !== cut) kept(depths * cut * hidden); // the state that the depth starts from
  }
  if (head) {
    kept((1 + depths) * whole * hidden);
    exact((1 + depths) * whole * (layout.tp > 1 ? 2 + layout.tp : 1));
    // Logits of one small chunk stay, others are computed again.
    if (own <= Math.min(8192, Math.max(256, 2 ** 24 / whole)) && whole * own <= 2 ** 22) {
      exact((1 + depths) * whole * 4 * Math.ceil(own / 4));
    }
  }
  return list;
}
