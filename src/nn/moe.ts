import { expert_tiles } from "../ops/grouped_linear.ts";
import { expertCapacity, type LimitOptions } from "../ops/moe_limit.ts";
import { moe_plan, moe_unpermute } from "../ops/moe.ts";
import { type RouterOptions, type RouterScore, router_weights } from "../ops/router.ts";
import { recompute } from "../autograd/recompute.ts";
import { promote } from "../tensor/scope.ts";
import { localsOf, shardedOf } from "../tensor/sharded.ts";
import { Tensor } from "../tensor/tensor.ts";
import { type ForwardContext, recomputes } from "./context.ts";
import { type Dispatched, dispatch } from "./dispatch.ts";
import { type Division, sizeOfGroup, SOLO } from "./division.ts";
import { MLP } from "./mlp.ts";
import type { MoERun } from "./moe_training.ts";
import { grouped_linear, linear } from "./product.ts";
import { route } from "./route.ts";
import type { Weight, Weights } from "./weights.ts";

/** Of all experts, of which a rank holds the part of its place in `Division.ep`. */
export interface MoESizes {
  readonly hidden: number;
  readonly n_routed_experts: number;
  readonly num_experts_per_tok: number;
  /** Hidden units that a rank has of an expert: all of them over `Division.etp`. */
  readonly moe_intermediate_size: number;
  /** Width in which the routed experts work; null: `hidden`. */
  readonly moe_latent_size: number | null;
  /** Width of a rank's part of the shared expert: that of the whole over `Division.tp`; 0: none. */
  readonly shared_size: number;
  /** Whether its output is multiplied by sigmoid(x g^T), g [1, hidden]; default: not. */
  readonly shared_gate?: boolean;
  readonly n_group: number;
  readonly topk_group: number;
  /** How many of its best experts make a group's score. */
  readonly group_best: number;
  readonly scoring_func: RouterScore;
  /** What the correction bias is added to. */
  readonly router_choice: "score" | "logits";
  readonly norm_topk_prob: boolean;
  readonly routed_scaling_factor: number;
  /** Biases of the shared expert and the latent projections; routed experts have none. */
  readonly bias: boolean;
}

/**
 * Mixture of experts: fc2(sum_e w_e expert_e(fc1(x))) + shared(x), routed by scores with a correction bias.
 * Without a latent width fc1 and fc2 are the identity. The router and the shared expert read the full width.
 * A token that a training run drops gets the shared expert alone.
 */
export class MoE {
  readonly sizes: MoESizes;
  readonly division: Division;
  readonly path: string;
  readonly gate: Tensor;
  /** Chooses experts but does not weigh them; moved by load balancing, not by the loss. */
  readonly correction_bias: Tensor;
  readonly options: RouterOptions;
  /** (own experts, width, inner width) */
  readonly up: Weight;
  readonly down: Weight;
  readonly latent: { fc1: Weight; fc1_bias: Tensor | null; fc2: Weight; fc2_bias: Tensor | null } | null;
  readonly shared: MLP | null;
  /** (1, hidden) */
  readonly shared_gate: Tensor | null;

  constructor(sizes: MoESizes, w: Weights, division: Division = SOLO) {
    const { hidden, n_routed_experts: E, moe_intermediate_size: F, moe_latent_size } = sizes;
    const X = moe_latent_size ?? hidden;
    const own = E / sizeOfGroup(division.ep);
    this.sizes = sizes;
    this.division = division;
    this.path = w.path;
    this.options = {
      topk: sizes.num_experts_per_tok, n_group: sizes.n_group, topk_group: sizes.topk_group,
      group_best: sizes.group_best, score: sizes.scoring_func, choice: sizes.router_choice,
      norm_topk_prob: sizes.norm_topk_prob, scaling: sizes.routed_scaling_factor,
    };
    this.gate = w.take("gate.weight", [E, hidden]);
    this.correction_bias = w.take("gate.e_score_correction_bias", [E]);
    this.up = w.takeWeight("experts.up_proj", [own, F, X]);
    this.down = w.takeWeight("experts.down_proj", [own, X, F]);
    const bias = (name: string, width: number) => sizes.bias ? w.take(`${name}.bias`, [width]) : null;
    this.latent = moe_latent_size === null ? null : {
      fc1: w.takeWeight("fc1_latent_proj.weight", [X, hidden]), fc1_bias: bias("fc1_latent_proj", X),
      fc2: w.takeWeight("fc2_latent_proj.weight", [hidden, X]), fc2_bias: bias("fc2_latent_proj", hidden),
    };
    this.shared = sizes.shared_size > 0
      ? new MLP(hidden, sizes.shared_size, sizes.bias, w.at("shared_experts"), division)
      : null;
    this.shared_gate = this.shared && sizes.shared_gate
      ? w.take("shared_expert_gate.weight", [1, hidden]) : null;
  }

  /** (batch, seqlen, hidden) -> (batch, seqlen, hidden), plus the residual */
  forward(x_BLD: Tensor, context: ForwardContext, residual: Tensor | null = null): Tensor {
    const { hidden, n_routed_experts: E } = this.sizes;
    const x_TD = x_BLD.reshape([-1, hidden]);
    const routed = route(x_TD, this, context);
    const { score = "sigmoid" } = this.options;
    context.routing?.push(promote({ layer: this.path, score, ...routed }));
    const inner = this.latent ? linear(x_TD, this.latent.fc1, this.latent.fc1_bias) : x_TD;
    const { weight, index } = routed;
    const limit = limitOf(index, E, context.moe);
    const { overflow } = context;
    const division = overflow ? this.division : { ...this.division, expert_budget: undefined };
    const sent = dispatch({ x: inner, weight, index, E, limit }, division, context.border);
    overflow?.push(...promote(sent.missing.map((missing) => ({ layer: this.path, ...missing }))));
    // The two products of the shared expert need nothing of the others: one for each way of the tokens.
    const shared = this.#shared(x_TD, residual && residual.reshape([-1, hidden]), context);
    const isWeighed = context.moe?.weighing === "activation";
    const expert_out = this.#experts(sent, isWeighed, recomputes(context, "moe_act"));
    if (!this.latent) return sent.combine(expert_out, shared, isWeighed).reshape(x_BLD.shape);
    let base: Tensor | null = null;
    const combined = sent.combine(expert_out, () => {
      base = shared();
      return null;
    }, isWeighed);
    return linear(combined, this.latent.fc2, this.latent.fc2_bias, base).reshape(x_BLD.shape);
  }

  /**
   * One row for every slot.
   * @param isWeighed whether weights are multiplied in before the down projection
   * @param again whether what the activation gives is given back and made a second time
   */
  #experts(
    { x, offsets, permute, rows, spare, weigh }: Dispatched, isWeighed: boolean, again: boolean,
  ): Tensor {
    const tiles = this.up instanceof Tensor ? expert_tiles(offsets, rows) : null;
    const activated = (input: Tensor) => grouped_linear(
      input, this.up, offsets, { activation: "relu2", tiles, spare, ...(permute && { permute }) });
    const read = [x, offsets, tiles, ...Object.values(permute ?? {})].filter(
      (table): table is Tensor => table instanceof Tensor);
    const [up] = again
      ? recompute(read, (_, [input]) => [activated(input!)], { discard: true }) : [activated(x)];
    return grouped_linear(isWeighed ? weigh(up!) : up!, this.down, offsets, { tiles, spare });
  }

  /**
   * Begins with the shared expert. @returns what ends it: its output plus the residual, or that alone; null
   * without both
   */
  #shared(x: Tensor, residual: Tensor | null, context: ForwardContext): () => Tensor | null {
    const { shared, shared_gate: gate } = this;
    if (!shared) return () => residual;
    const leave = (inner: Tensor, u: Tensor, rest: Tensor | null) => gate
      ? gated(shared.leave(inner), linear(u, gate, null), rest) : shared.leave(inner, rest);
    if (recomputes(context, "shared_experts")) {
      const inputs = residual ? [x, residual] : [x];
      return () => recompute(inputs, (_, [u, rest = null]) => [leave(shared.inner(u!), u!, rest)])[0]!;
    }
    const inner = shared.inner(x);
    return () => leave(inner, x, residual);
  }
}

/**
 * base + sigmoid(logit) y, of an expert that every token chooses.
 * @param logit (tokens, 1)
 */
function gated(y: Tensor, logit: Tensor, base: Tensor | null): Tensor {
  const choice = shardedOf(localsOf(logit).map(({ device, shape }) => device.zeros(shape, "u32")));
  const weight = router_weights(logit, choice, { score: "sigmoid", norm_topk_prob: false, scaling: 1 });
  return moe_unpermute(y, weight, moe_plan(choice, 1), base);
}

/** The capacity and alignment that a training run asks for. */
function limitOf(index: Tensor, E: number, moe: MoERun | null | undefined): LimitOptions | null {
  if (!moe) return null;
  const { capacity_factor, drop_policy: policy, pad_to_capacity: pad, align } = moe;
  if (capacity_factor === Infinity && align === 1) return null;
  const [T, K] = index.shape as [number, number];
  const capacity = capacity_factor === Infinity ? null : expertCapacity(T, K, E, capacity_factor);
  return { capacity, policy, pad, align };
}
