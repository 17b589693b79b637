/** What a training run asks of its MoE layers beyond what the model itself says. */
import { DROP_POLICIES, type DropPolicy } from "../ops/moe_limit.ts";
import type { RouterOptions } from "../ops/router.ts";
import { UsageError } from "../tensor/errors.ts";
import type { Tensor } from "../tensor/tensor.ts";

export const ROUTER_DTYPES = ["f32", "bf16"] as const;
export const ROUTINGS = ["topk", "sinkhorn"] as const;
export const WEIGHINGS = ["output", "activation"] as const;

export interface MoETraining {
  /** The router's input is multiplied by U(1 - jitter, 1 + jitter). */
  readonly jitter: number;
  /** bf16: input, weight and logits of the router are rounded to it; sums stay f32. */
  readonly router_dtype: (typeof ROUTER_DTYPES)[number];
  /** Random logits load the experts evenly, and gradients pass straight through. For measuring speed. */
  readonly forced_balance: boolean;
  /** sinkhorn: the choice is by balanced scores, the weights are as ever. */
  readonly routing: (typeof ROUTINGS)[number];
  /** Rows of an expert over its even share; beyond, choices are dropped. Infinity: none is. */
  readonly capacity_factor: number;
  readonly drop_policy: DropPolicy;
  /** Every expert gets rows for its whole capacity. */
  readonly pad_to_capacity: boolean;
  /** Rows of an expert are filled up to a multiple of so many. */
  readonly align: number;
  /**
   * Where the weights of experts are multiplied in: with their outputs, or before the down projection, whose
   * result then is not kept for the backward pass.
   */
  readonly weighing: (typeof WEIGHINGS)[number];
}

/** No token is dropped, and the model routes as it would without training. */
export const MOE_TRAINING: MoETraining = {
  jitter: 0, router_dtype: "f32", forced_balance: false, routing: "topk", capacity_factor: Infinity,
  drop_policy: "probs", pad_to_capacity: false, align: 1, weighing: "output",
};

/** The same for one forward pass. */
export interface MoERun extends MoETraining {
  /** u32 [4]: seed low word, seed high word, number of the micro-batch, 0. For jitter and forced balance. */
  readonly counter?: Tensor | null | undefined;
  /** u32 [tokens]: where each token stands in the whole rows of its micro-batch; default: 0, 1, 2 ... */
  readonly rows?: Tensor | null;
}

/**
 * Fills in what is not given.
 * @throws UsageError for a value out of range
 */
export function makeMoETraining(
  given: { readonly [key in keyof MoETraining]?: MoETraining[key] | undefined },
): MoETraining {
  const set = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  const made: MoETraining = { ...MOE_TRAINING, ...set };
  const { jitter, capacity_factor: capacity, align } = made;
  const among = (name: keyof MoETraining, values: readonly string[]): [keyof MoETraining, boolean, string] =>
    [name, values.includes(String(made[name])), values.join(" or ")];
  const ranges: [keyof MoETraining, boolean, string][] = [
    ["jitter", jitter >= 0 && jitter < 1, "from 0 to below 1"],
    among("router_dtype", ROUTER_DTYPES), among("routing", ROUTINGS), among("drop_policy", DROP_POLICIES),
    among("weighing", WEIGHINGS),
    ["capacity_factor", capacity > 0, "above 0"],
    ["align", Number.isInteger(align) && align >= 1, "a whole number above 0"],
    ["pad_to_capacity", !made.pad_to_capacity || capacity < Infinity, "false without a capacity factor"],
  ];
  for (const [name, holds, expected] of ranges) {
    if (!holds) throw new UsageError(`The MoE option ${name} must be ${expected}, found ${made[name]}.`);
  }
  return made;
}

/** @throws UsageError where a run asks for what the model's routers cannot learn by. */
export function checkMoETraining(
  { routing }: MoETraining, router: RouterOptions,
  { quantile, balancing }: { readonly quantile: boolean; readonly balancing: boolean },
): void {
  const { score = "sigmoid", choice = "score", topk, norm_topk_prob } = router;
  if (topk === 1 && norm_topk_prob) {
    throw new UsageError(
      "A router of one expert per token learns only from weights that are not normalised: norm_topk_prob " +
      "must be false, found true.");
  }
  if (routing === "sinkhorn") {
    const wanted = topk === 1 ? "sigmoid" : "softmax";
    if (score !== wanted || norm_topk_prob || choice !== "logits") {
      throw new UsageError(
        `Sinkhorn routing needs scoring_func ${wanted} for ${topk} experts per token, router_choice logits ` +
        `and norm_topk_prob false, found ${score}, ${choice} and ${norm_topk_prob}.`);
    }
    if (balancing) {
      throw new UsageError("Sinkhorn routing balances by itself: the balancing coefficients must be 0.");
    }
  }
  if (quantile && choice !== "logits") {
    throw new UsageError(
      `Balancing by quantiles moves logits: the model's router_choice must be logits, found ${choice}.`);
  }
}
