import { afterAll, describe, expect, test } from "vitest";
import { LAYOUTS } from "../../src/cli/bench/layouts.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { FULL_PRECISION } from "../../src/precision/plan.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { localsOf } from "../../src/tensor/sharded.ts";
import type { Batch } from "../../src/train/packing.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkPredicted, smallBatches, SMALL, startLayout, trainSmall, worstOf } from "../support/layouts.ts";

/** The adapter's arithmetic is tested op by op; one adapter is enough for what ranks do together. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

const even = smallBatches(4, false);
const ragged = smallBatches(4, true);

/**
 * Layouts that have little to do with each other; KRAIT_LAYOUTS=all takes those of `krait bench layouts`,
 * which compares more steps.
 */
const tried = process.env.KRAIT_LAYOUTS === "all" ? LAYOUTS : [
  "dp=4", "tp=4", "cp=2", "pp=3", "pp=2,vpp=2", "tp=2,dp=2,pp=2", "tp=2,cp=2,pp=2,cp_kind=alltoall",
  "dp=2,ep=2", "tp=2,cp=2,dp=2,pp=2,ep=4",
];

describe("a layout trains as one rank does", () => {
  const one = trainSmall(device, "tp=1", even, { steps: 3, clip: 1 });

  for (const layout of tried) {
    test(layout, async () => {
      const expected = await one;
      const before = device.pool.liveBytes;
      const found = await trainSmall(device, layout, even, { steps: 3, clip: 1 });
      const gradient = worstOf(found.gradients, expected.gradients);
      expect(gradient.error, gradient.name).toBeLessThan(1e-5);
      const parameter = worstOf(found.parameters, expected.parameters);
      expect(parameter.error, parameter.name).toBeLessThan(2e-5);
      found.steps.forEach((step, i) => {
        const { loss, aux_loss, mtp_loss, grad_norm, max_violation } = expected.steps[i]!;
        expect(step.loss / loss).toBeCloseTo(1, 5);
        expect(step.aux_loss / aux_loss).toBeCloseTo(1, 5);
        expect(step.mtp_loss[0]! / mtp_loss[0]!).toBeCloseTo(1, 5);
        expect(step.grad_norm / grad_norm).toBeCloseTo(1, 5);
        expect(step.max_violation).toBe(max_violation);
      });
      checkPredicted(found);
      expect(device.pool.liveBytes).toBe(before);
    });
  }
});

describe("passes in pairs", () => {
  test.each([
    ["dp=2,ep=2", 4], ["tp=2,ep=2,dispatch=flex", 3], ["pp=2,vpp=2,dp=2,ep=2,group=2", 4],
  ])("give the bits of passes one after the other: %s", async (layout, micros) => {
    const batches = smallBatches(micros, true);
    const [plain, paired] = [
      await trainSmall(device, layout, batches, { steps: 2, clip: 1 }),
      await trainSmall(device, `${layout},overlap=on`, batches, { steps: 2, clip: 1 }),
    ];
    expect(paired.steps).toEqual(plain.steps);
    expect(worstOf(paired.gradients, plain.gradients).error).toBe(0);
    expect(worstOf(paired.parameters, plain.parameters).error).toBe(0);
  });

  test("keep what their exchanges sent, and compute in f32", async () => {
    for (const recompute of ["moe", "shared_experts", "full"]) {
      await expect(trainSmall(
        device, "dp=2,ep=2,overlap=on", even, { recompute: parseRecompute(recompute) },
      )).rejects.toThrow(/overlap keeps what experts .* expected recompute .* found/);
    }
    await expect(trainSmall(
      device, "dp=2,ep=2,overlap=on", even, { precision: { ...FULL_PRECISION, recipe: "bf16" } },
    )).rejects.toThrow(/"overlap is for f32": expected precision f32, found bf16\./);
  });
});

describe("rows of unequal length", () => {
  for (const per_token of [false, true]) {
    test(`equal one rank, ${per_token ? "by position" : "by micro-batch"}`, async () => {
      const one = await trainSmall(device, "tp=1", ragged, { per_token });
      for (const layout of ["tp=2,dp=2", "cp=4,cp_kind=hierarchical"]) {
        const four = await trainSmall(device, layout, ragged, { per_token });
        const { name, error } = worstOf(four.gradients, one.gradients);
        expect(error, `${layout}: ${name}`).toBeLessThan(1e-5);
        expect(four.steps[0]!.loss / one.steps[0]!.loss).toBeCloseTo(1, 6);
      }
    });
  }

  test("are not the same by position and by micro-batch", async () => {
    const [mean, token] = [
      await trainSmall(device, "dp=2", ragged), await trainSmall(device, "dp=2", ragged, { per_token: true }),
    ];
    expect(worstOf(mean.gradients, token.gradients).error).toBeGreaterThan(1e-3);
  });
});

describe("routers of ranks that share tokens", () => {
  const LAYOUT = "tp=2,cp=2,dp=2,ep=4";
  const losses = { aux_coeff: 0.1, z_loss: 0.01 };
  type Options = Parameters<typeof trainSmall>[3];
  const expectEqual = async (
    batches: typeof even, options: Options, reference: Options = options, whole = batches,
  ) => {
    const one = await trainSmall(device, "tp=1", whole, reference);
    const many = await trainSmall(device, LAYOUT, batches, options);
    const { name, error } = worstOf(many.gradients, one.gradients);
    expect(error, name).toBeLessThan(1e-5);
    many.steps.forEach(({ loss, aux_loss }, i) => {
      expect(loss / one.steps[i]!.loss).toBeCloseTo(1, 5);
      expect(aux_loss).toBeCloseTo(one.steps[i]!.aux_loss, 6);
    });
    return { one, many };
  };

  test.each([
    ["by micro-batch, with jitter", even, { moe: { jitter: 0.3 } }],
    ["by position", ragged, { per_token: true }],
  ] as const)("have the same losses of sequences, micro-batches and logits: %s", async (_, batches, more) => {
    await expectEqual(batches, { ...losses, aux_loss: 0.1, ...more });
  });

  test.each([false, true])("count a step as one batch; by position: %s", async (per_token) => {
    const [first, second] = even as [Batch, Batch, ...Batch[]];
    const both = (key: "ids" | "labels" | "input_ids" | "seq_idx") =>
      Int32Array.from([...first[key], ...second[key]]);
    const whole: Batch = {
      ...first, batch: 2 * first.batch, scored: first.scored + second.scored, ids: both("ids"),
      labels: both("labels"), input_ids: both("input_ids"), seq_idx: both("seq_idx"),
    };
    await expectEqual(
      [first, second], { ...losses, per_token, global_aux_loss: 0.1 },
      { ...losses, per_token, aux_loss: 0.1, batch: whole.batch }, [whole]);
  });

  test("move biases alike, by the rate or not at all", async () => {
    const bias_rate = 2 ** -7; // steps of it are exact
    const { mesh, trainer, dispose } = startLayout(device, LAYOUT, even.length, SMALL, { bias_rate });
    await trainer.step(even);
    for (const [name, { held }] of mesh.parameters) {
      if (!name.includes("correction_bias")) continue;
      const [first, ...others] =
        await Promise.all(localsOf(held[0]!.tensor).map(async (local) => [...await local.read()]));
      for (const value of first!) expect([-bias_rate, 0, bias_rate]).toContain(value);
      expect(first!.some((value) => value !== 0)).toBe(true);
      expect(others).toEqual(Array(7).fill(first));
    }
    dispose();
  });

  test("balance the tokens of a micro-batch together", async () => {
    const config =
      {
        ...SMALL, router_choice: "logits", scoring_func: "softmax", norm_topk_prob: false,
        shared_expert_gate: true,
      } as const;
    const plain = { config, aux_coeff: 0 };
    const { one } = await expectEqual(even, { ...plain, moe: { routing: "sinkhorn" } });
    const { steps: [other] } = await trainSmall(device, "tp=1", even, plain);
    expect(one.steps[0]!.max_violation).toBeLessThan(other!.max_violation!);
  });

  test("move biases by the quantiles of a micro-batch, and draw the same random logits", async () => {
    const config = { ...SMALL, router_choice: "logits" } as const;
    const { one, many } = await expectEqual(
      even, { config, steps: 2, bias_update: "quantile", bias_rate: 0.5, moe: { forced_balance: true } });
    const biases = ({ parameters }: typeof one) =>
      new Map([...parameters].filter(([name]) => name.includes("bias")));
    expect(Math.max(...[...biases(one).values()].flatMap((bias) => [...bias]))).toBeGreaterThan(0.01);
    const { name, error } = worstOf(biases(many), biases(one));
    expect(error, name).toBeLessThan(1e-5);
  });
});

describe("prediction layers", () => {
  const layouts = ["pp=3,stages=Etttttt|m|L", "tp=2,pp=3,stages=E|ttttttm|L"];
  test.each(layouts)("apart from the head: %s", async (text) => {
    const options = { mtp_depths: 2 };
    const one = await trainSmall(device, "tp=1", even, options);
    const found = await trainSmall(device, text, even, options);
    const { name, error } = worstOf(found.gradients, one.gradients);
    expect(error, name).toBeLessThan(1e-5);
    found.steps[0]!.mtp_loss.forEach((loss, i) =>
      expect(loss / one.steps[0]!.mtp_loss[i]!).toBeCloseTo(1, 5));
  });
});

describe("the update", () => {
  test("divided among the ranks gives the bits of an undivided one", async () => {
    const options = { steps: 2, clip: 0.5 };
    const divided = await trainSmall(device, "dp=4", even, options);
    const whole = await trainSmall(device, "dp=4", even, { ...options, zero: false });
    expect(divided.steps).toEqual(whole.steps);
    expect(worstOf(divided.parameters, whole.parameters).error).toBe(0);
    expect(divided.optimizerBytes).toBeLessThan(0.27 * whole.optimizerBytes);
  });

  test("has the same bits with buckets of any size, each of them summed by itself", async () => {
    const sizesOf = ({ collectives }: Awaited<ReturnType<typeof trainSmall>>) => collectives.flatMap(
      ({ kind, group, bytes }) => (kind === "reduce_scatter" && group === "dp-cp" ? [bytes / 4 / 3] : []));
    const [whole, some, all] = [
      await trainSmall(device, "dp=4", even),
      await trainSmall(device, "dp=4", even, { bucket_size: 4096 }),
      await trainSmall(device, "dp=4", even, { bucket_size: 1 }),
    ];
    for (const found of [some, all]) {
      expect(found.steps.map(({ loss }) => loss)).toEqual(whole.steps.map(({ loss }) => loss));
      expect(worstOf(found.gradients, whole.gradients).error).toBe(0);
      expect(worstOf(found.parameters, whole.parameters).error).toBe(0);
    }
    expect(sizesOf(whole)).toHaveLength(1);
    expect(sizesOf(some).length).toBeGreaterThan(3);
    // Filled up to parts that can be bound; only a parameter that is larger has a larger bucket.
    const largest = Math.max(...[...whole.parameters.values()].map(({ length }) => length));
    for (const size of sizesOf(some)) expect(size).toBeLessThanOrEqual(Math.max(4096, largest) + 4 * 128);
    const trained = [...whole.parameters.keys()].filter((name) => !name.endsWith("correction_bias"));
    expect(sizesOf(all)).toHaveLength(trained.length);
  });

  test("sums the gradients of keys and values that ranks share", async () => {
    const config = { ...SMALL, num_key_value_heads: 2 };
    const one = await trainSmall(device, "tp=1", even, { config });
    const four = await trainSmall(device, "tp=4", even, { config });
    const { name, error } = worstOf(four.gradients, one.gradients);
    expect(error, name).toBeLessThan(1e-5);
  });

  test("is the same twice", async () => {
    const [a, b] = [await trainSmall(device, "tp=2,pp=2", even), await trainSmall(device, "tp=2,pp=2", even)];
    expect(a.steps).toEqual(b.steps);
    expect(worstOf(a.parameters, b.parameters).error).toBe(0);
  });
});

test("what ranks cannot divide is refused", async () => {
  await expect(trainSmall(device, "dp=3", even)).rejects.toThrow(
    /must be a multiple of dp = 3, found accumulate = 4/);
  await expect(trainSmall(device, "tp=2", even, { moments: "8bit" })).rejects.toThrow(
    '"moments of 8 bits that share a scale lie on one rank": expected pieces of ' +
    "backbone.layers.0.mixer.conv1d.bias of a multiple of 64 elements, which tp = 2 cuts, found one of 32.");
  await expect(trainSmall(device, "tp=8", even)).rejects.toThrow(/tp divides the Mamba groups/);
  const before = device.pool.liveBytes;
  await expect(trainSmall(device, "pp=3,stages=Ettt||tttmL", even)).rejects.toThrow(
    /"a stage that is trained holds something": expected layers, .* found nothing in stage 1\./);
  await expect(trainSmall(device, "tp=2,sp=off", even)).rejects.toThrow(/tp > 1 with experts needs sp/);
  expect(device.pool.liveBytes).toBe(before);
});
