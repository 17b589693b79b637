import { expert_tiles } from "../ops/grouped_linear.ts";
import { moe_plan, moe_unpermute } from "../ops/moe.ts";
import { router } from "../ops/router.ts";
import { promote } from "../tensor/scope.ts";
import { Tensor } from "../tensor/tensor.ts";
import type { ForwardContext } from "./context.ts";
import { type Division, SOLO } from "./division.ts";
import { MLP } from "./mlp.ts";
import { grouped_linear, linear } from "./product.ts";
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
  readonly norm_topk_prob: boolean;
  readonly routed_scaling_factor: number;
  /** Biases of the shared expert and the latent projections; routed experts have none. */
  readonly bias: boolean;
}

/**
 * Mixture of experts: fc2(sum_e w_e expert_e(fc1(x))) + shared(x), routed by sigmoid scores with a correction
 * bias. Without a latent width fc1 and fc2 are the identity. The router and the shared expert read the full
 * width.
 */
export class MoE {
  readonly sizes: MoESizes;
  readonly path: string;
  readonly gate: Tensor;
  /** Chooses experts but does not weigh them; moved by load balancing, not by the loss. */
  readonly correction_bias: Tensor;
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
    const { hidden, n_routed_experts: E, num_experts_per_tok: K, n_group, topk_group, norm_topk_prob } =
      this.sizes;
    const x_TD = x_BLD.reshape([-1, hidden]);
    const logits = linear(x_TD, this.gate, null);
    const [weight, index] = router(logits, this.correction_bias, {
      topk: K, n_group, topk_group, norm_topk_prob, scaling: this.sizes.routed_scaling_factor,
    }) as [Tensor, Tensor];
    context.routing?.push(promote({ layer: this.path, score: "sigmoid" as const, logits, weight, index }));
    const plan = moe_plan(index, E);
    const inner = this.latent ? linear(x_TD, this.latent.fc1, this.latent.fc1_bias) : x_TD;
    const tiles = this.up instanceof Tensor ? expert_tiles(plan.offsets, plan.slot_token.size) : null;
    const up = grouped_linear(inner, this.up, plan.offsets,
      { permute: { ...plan, topk: K }, activation: "relu2", tiles });
    const expert_out = grouped_linear(up, this.down, plan.offsets, { tiles });
    const rest = residual && residual.reshape([-1, hidden]);
    const base = this.shared ? this.shared.forward(x_TD, rest) : rest;
    if (!this.latent) return moe_unpermute(expert_out, weight, plan, base).reshape(x_BLD.shape);
    const combined = moe_unpermute(expert_out, weight, plan);
    return linear(combined, this.latent.fc2, this.latent.fc2_bias, base).reshape(x_BLD.shape);
  }
}
