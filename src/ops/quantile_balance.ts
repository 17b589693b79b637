/** Experts balanced by quantiles of their logits: an alternative to steps of the sign. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";
import { router } from "./router.ts";

const WG = 64;

/**
 * What would have to be taken from every expert's logits for an even load: with alpha_t the (K + 1)-th
 * largest logit + bias of a token, the (T * K / E + 1)-th largest of logits_te - alpha_t over the tokens.
 *
 * @param logits  f32 [T, E]
 * @param bias    f32 [E], that the choice adds to the logits
 * @returns f32 [E]
 * @throws ShapeError unless E divides T * K and K is below E
 */
export const router_quantile = defineOp({
  name: "router_quantile",
  forward(_ctx, logits: Tensor, bias: Tensor, { topk }: { readonly topk: number }): Tensor {
    const name = "router_quantile";
    const { device } = logits;
    check(logits.shape.length === 2, name, "logits", "[T, E]", logits);
    const [T, E] = logits.shape as [number, number];
    check(bias.shape.length === 1 && bias.size === E, name, "bias", `[${E}]`, bias);
    check(Number.isInteger(topk) && topk >= 1 && topk < E, name, "topk", `from 1 to ${E - 1}`, topk);
    const choices = T * topk;
    check(
      T > 0 && choices % E === 0, name, "tokens * topk", `a multiple of ${E} experts above 0`, choices);
    const candidates = topk + 1;
    const [, topk_idx] = router(logits, bias, {
      topk: candidates, n_group: 1, topk_group: 1, norm_topk_prob: false, scaling: 1, choice: "logits",
    });
    const alpha = device.empty([T]);
    const estimate = device.empty([E]);
    const params = { tokens: T, experts: E, candidates, rank: choices / E + 1 };
    launch("moe/router_quantile", {
      entry: "thresholds", bind: { logits, bias, topk_idx: topk_idx!, alpha }, params,
      workgroups: [Math.ceil(T / WG)],
    });
    launch("moe/router_quantile", {
      entry: "quantile", bind: { logits, alpha, estimate }, params, workgroups: [E],
    });
    return estimate;
  },
});

/**
 * Moves beta = -bias by `rate` of the way towards `estimate` and centres it, in place.
 *
 * @param bias      f32 [E], changed; the choice adds it to the logits
 * @param estimate  f32 [E], from `router_quantile`, the mean over all tokens of a step
 * @param rate      from 0 to 1
 * @param gate      f32 [1], negative: nothing changes; or null
 */
export const update_quantile_bias = defineOp({
  name: "update_quantile_bias",
  mutates: [0],
  forward(_ctx, bias: Tensor, estimate: Tensor, rate: number, gate: Tensor | null = null): Tensor[] {
    const name = "update_quantile_bias";
    const E = bias.size;
    check(E >= 1 && bias.shape.length === 1, name, "bias", "[E] with an expert", bias);
    check(estimate.size === E, name, "estimate", `[${E}]`, estimate);
    check(rate >= 0 && rate <= 1, name, "rate", "from 0 to 1", rate);
    if (gate) check(gate.size === 1, name, "gate", "[1]", gate);
    launch("moe/quantile_bias", {
      bind: { bias, estimate, gate: gate ?? estimate }, params: { experts: E, rate },
      conditions: gate ? ["gated"] : [], workgroups: [1],
    });
    return [];
  },
});
