import { expert_tiles } from "../ops/grouped_linear.ts";
import { moe_permute, moe_plan, type MoePlan, moe_unpermute } from "../ops/moe.ts";
import { expertCapacity, moe_limit } from "../ops/moe_limit.ts";
import { moe_weigh } from "../ops/moe_weigh.ts";
import type { RouterOptions, RouterScore } from "../ops/router.ts";
import { promote } from "../tensor/scope.ts";
import { Tensor } from "../tensor/tensor.ts";
import type { ForwardContext } from "./context.ts";
import { type Division, SOLO } from "./division.ts";
import { MLP } from "./mlp.ts";
import type { MoERun } from "./moe_training.ts";
import { grouped_linear, linear } from "./product.ts";
import { route } from "./route.ts";
import type { Weight, Weights } from "./weights.ts";

export interface MoESizes {
  readonly hidden: number;
  readonly n_routed_experts: number;
  readonly num_experts_per_tok: number;
  readonly moe_intermediate_size: number;
  /** Width in which the routed experts work; null: `hidden`. */
  readonly moe_latent_size: number | null;
  /** Width of a rank's part of the shared expert: that of the whole over `Division.tp`; 0: none. */
  readonly shared_size: number;
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
  readonly path: string;
  readonly gate: Tensor;
  /** Chooses experts but does not weigh them; moved by load balancing, not by the loss. */
  readonly correction_bias: Tensor;
  readonly options: RouterOptions;
  /** (experts, width, inner width) */
  readonly up: Weight;
  readonly down: Weight;
  readonly latent: { fc1: Weight; fc1_bias: Tensor | null; fc2: Weight; fc2_bias: Tensor | null } | null;
  readonly shared: MLP | null;

  constructor(sizes: MoESizes, w: Weights, division: Division = SOLO) {
    const { hidden, n_routed_experts: E, moe_intermediate_size: F, moe_latent_size } = sizes;
    const X = moe_latent_size ?? hidden;
    this.sizes = sizes;
    this.path = w.path;
    this.options = {
      topk: sizes.num_experts_per_tok, n_group: sizes.n_group, topk_group: sizes.topk_group,
      group_best: sizes.group_best, score: sizes.scoring_func, choice: sizes.router_choice,
      norm_topk_prob: sizes.norm_topk_prob, scaling: sizes.routed_scaling_factor,
    };
    this.gate = w.take("gate.weight", [E, hidden]);
    this.correction_bias = w.take("gate.e_score_correction_bias", [E]);
    this.up = w.takeWeight("experts.up_proj", [E, F, X]);
    this.down = w.takeWeight("experts.down_proj", [E, X, F]);
    const bias = (name: string, width: number) => sizes.bias ? w.take(`${name}.bias`, [width]) : null;
    this.latent = moe_latent_size === null ? null : {
      fc1: w.takeWeight("fc1_latent_proj.weight", [X, hidden]), fc1_bias: bias("fc1_latent_proj", X),
      fc2: w.takeWeight("fc2_latent_proj.weight", [hidden, X]), fc2_bias: bias("fc2_latent_proj", hidden),
    };
    this.shared = sizes.shared_size > 0
      ? new MLP(hidden, sizes.shared_size, sizes.bias, w.at("shared_experts"), division)
      : null;
  }

  /** (batch, seqlen, hidden) -> (batch, seqlen, hidden), plus the residual */
  forward(x_BLD: Tensor, context: ForwardContext, residual: Tensor | null = null): Tensor {
    const { hidden, n_routed_experts: E } = this.sizes;
    const x_TD = x_BLD.reshape([-1, hidden]);
    const routed = route(x_TD, this, context);
    const { score = "sigmoid" } = this.options;
    context.routing?.push(promote({ layer: this.path, score, ...routed }));
    const { weight, index } = routed;
    const plan = limited(moe_plan(index, E), weight, context.moe);
    const inner = this.latent ? linear(x_TD, this.latent.fc1, this.latent.fc1_bias) : x_TD;
    const isWeighed = context.moe?.weighing === "activation";
    const expert_out = this.#experts(inner, plan, isWeighed ? weight : null);
    const rest = residual && residual.reshape([-1, hidden]);
    const base = this.shared ? this.shared.forward(x_TD, rest) : rest;
    const left = isWeighed ? this.options.topk : weight;
    if (!this.latent) return moe_unpermute(expert_out, left, plan, base).reshape(x_BLD.shape);
    const combined = moe_unpermute(expert_out, left, plan);
    return linear(combined, this.latent.fc2, this.latent.fc2_bias, base).reshape(x_BLD.shape);
  }

  /**
   * (tokens, inner width) -> one row for every slot of the plan, in expert order
   * @param weight multiplied in before the down projection, or null
   */
  #experts(inner: Tensor, plan: MoePlan, weight: Tensor | null): Tensor {
    const { offsets, spare = false } = plan;
    const topk = this.options.topk;
    const tiles = this.up instanceof Tensor ? expert_tiles(offsets, plan.slot_token.size) : null;
    const up = spare
      ? grouped_linear(
        moe_permute(inner, plan, topk), this.up, offsets, { activation: "relu2", tiles, spare })
      : grouped_linear(inner, this.up, offsets, { permute: { ...plan, topk }, activation: "relu2", tiles });
    const weighed = weight ? moe_weigh(up, weight, plan) : up;
    return grouped_linear(weighed, this.down, offsets, { tiles, spare });
  }
}

/** The plan with the capacity and alignment that a training run asks for. */
function limited(plan: MoePlan, weight: Tensor, moe: MoERun | null | undefined): MoePlan {
  if (!moe) return plan;
  const { capacity_factor, drop_policy: policy, pad_to_capacity: pad, align } = moe;
  if (capacity_factor === Infinity && align === 1) return plan;
  const [T, K] = weight.shape as [number, number];
  const capacity = capacity_factor === Infinity
    ? null : expertCapacity(T, K, plan.offsets.size - 1, capacity_factor);
  return moe_limit(plan, weight, { capacity, policy, pad, align });
}
