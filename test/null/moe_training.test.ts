import { expect, test } from "vitest";
import { parseCommand } from "../../src/cli/args.ts";
import { train } from "../../src/cli/commands/train.ts";
import { checkMoETraining, makeMoETraining, MOE_TRAINING } from "../../src/nn/moe_training.ts";
import { expertCapacity } from "../../src/ops/moe_limit.ts";
import { makeRecipe, moeTrainingOf } from "../../src/train/recipe.ts";

test("a recipe without wishes drops nothing and routes as the model says", () => {
  expect(moeTrainingOf(makeRecipe({}))).toEqual(MOE_TRAINING);
  expect(moeTrainingOf(makeRecipe({ capacity_factor: 1.25, pad_to_capacity: true, router_jitter: 0.01 })))
    .toEqual({ ...MOE_TRAINING, capacity_factor: 1.25, pad_to_capacity: true, jitter: 0.01 });
});

test.each([
  [{ jitter: 1 }, /jitter must be from 0 to below 1, found 1/],
  [{ capacity_factor: -1 }, /capacity_factor must be above 0, found -1/],
  [{ pad_to_capacity: true }, /pad_to_capacity must be false without a capacity factor, found true/],
  [{ align: 1.5 }, /align must be a whole number above 0, found 1.5/],
  [{ drop_policy: "last" as "probs" }, /drop_policy must be probs or position, found last/],
  [{ weighing: "both" as "output" }, /weighing must be output or activation, found both/],
  [{ routing: "hash" as "topk" }, /routing must be topk or sinkhorn, found hash/],
  [{ router_dtype: "f16" as "bf16" }, /router_dtype must be f32 or bf16, found f16/],
])("%j is refused", (given, message) => expect(() => makeMoETraining(given)).toThrow(message));

test.each([
  [{ aux_loss: -1 }, /aux_loss must be at least 0, found -1/],
  [{ global_aux_loss: NaN }, /global_aux_loss must be at least 0, found NaN/],
  [{ z_loss: -0.1 }, /z_loss must be at least 0, found -0.1/],
  [{ bias_update: "mean" as "sign" }, /bias_update must be sign or quantile, found mean/],
  [{ pad_to_capacity: true }, /pad_to_capacity must be false without a capacity factor/],
])("a recipe with %j is refused", (given, message) => expect(() => makeRecipe(given)).toThrow(message));

test.each([
  [["--router-jitter", "-1"], /--router-jitter must be at least 0, found -1/],
  [["--router-dtype", "f16"], /--router-dtype .*f32, bf16.*found "f16"/],
  [["--routing", "hash"], /--routing .*topk, sinkhorn.*found "hash"/],
  [["--weighing", "both"], /--weighing .*output, activation.*found "both"/],
  [["--bias-update", "mean"], /--bias-update .*sign, quantile.*found "mean"/],
  [["--align", "0"], /--align must be at least 1, found 0/],
  [["--align", "1.5"], /--align needs a whole number, found "1.5"/],
  [["--forced-balance=yes"], /--forced-balance takes no value, found "yes"/],
])("krait train %j is refused", (given, message) =>
  expect(() => parseCommand(train, ["--out", "x", ...given])).toThrow(message));

test("what a model's routers cannot learn by is refused", () => {
  const router = { topk: 2, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 1 };
  const sinkhorn = makeMoETraining({ routing: "sinkhorn" });
  const none = { quantile: false, balancing: false };
  expect(() => checkMoETraining(MOE_TRAINING, { ...router, topk: 1 }, none)).toThrow(
    /one expert per token.*norm_topk_prob must be false/);
  expect(() => checkMoETraining(sinkhorn, router, none)).toThrow(/scoring_func softmax.*found sigmoid/);
  const fitting = { ...router, score: "softmax", choice: "logits", norm_topk_prob: false } as const;
  checkMoETraining(sinkhorn, fitting, none);
  expect(() => checkMoETraining(sinkhorn, { ...fitting, topk: 1 }, none)).toThrow(/scoring_func sigmoid/);
  expect(() => checkMoETraining(sinkhorn, fitting, { ...none, balancing: true })).toThrow(/must be 0/);
  expect(() => checkMoETraining(MOE_TRAINING, router, { ...none, quantile: true })).toThrow(
    /router_choice must be logits, found score/);
});

test("the capacity of an expert is its even share times the factor, rounded up", () => {
  expect(expertCapacity(16, 2, 4, 1)).toBe(8);
  expect(expertCapacity(16, 2, 4, 1.1)).toBe(9);
  expect(expertCapacity(5, 2, 4, 1)).toBe(3);
  expect(expertCapacity(16, 2, 4, 9)).toBe(16); // no expert is chosen twice by a token
});
