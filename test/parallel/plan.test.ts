import { describe, expect, test } from "vitest";
import { forwardFlops } from "../../src/models/accounting.ts";
import { preset } from "../../src/models/presets.ts";
import { cutUnits, layerCosts, productTime, ranksInDomain, STEP_PARTS } from "../../src/parallel/cost.ts";
import type { CostOptions } from "../../src/parallel/cost.ts";
import { EFFICIENCIES, gpuNamed, gpuNames, peakOf, PLAN_PRECISIONS } from "../../src/parallel/hardware.ts";
import { checkLayout, formatLayout, parseLayout } from "../../src/parallel/layout.ts";
import { shapeOf, shapeParameters, trainingFlops } from "../../src/parallel/model_shape.ts";
import { losesBy, searchPlans, stageText, USABLE_MEMORY } from "../../src/parallel/plan.ts";
import type { PlanRequest } from "../../src/parallel/plan.ts";
import { namedShape, PUBLISHED_RUNS, shapeNames } from "../../src/parallel/published.ts";
import { parseFlexible } from "../../src/parallel/stages.ts";
import { predictRun, requestOf, validate } from "../../src/parallel/validate.ts";
import { UsageError } from "../../src/tensor/errors.ts";

const h100 = gpuNamed("h100");
const options: CostOptions = {
  gpu: h100, efficiencies: EFFICIENCIES, precision: "bf16", recompute: "none", fsdp: false, unfolded: false,
  overlapExchange: false, gradientBytes: 4,
};
const request = (name: string, gpus: number, more: Partial<PlanRequest> = {}): PlanRequest => ({
  shape: namedShape(name)!, gpus, gpu: h100, precision: "bf16", seqlen: 4096, globalBatch: 256, ...more,
});
/** Rows of the folding paper that state their layout: no search, so all of them take a moment. */
const folding = PUBLISHED_RUNS.filter(({ table }) => table.startsWith("F3"));

describe("published rates", () => {
  const { predictions, orders, errors } = validate(folding);
  const tflops = (model: string, method: string, precision = "bf16") => predictions.find(({ run }) =>
    run.table === "F3" && run.model === model && run.method === method && run.precision === precision,
  )!.plan!.tflops;

  test("their orders are the predicted ones, but for one whose ends are within 3 %", () => {
    expect(orders).toHaveLength(13);
    expect(orders.filter(({ agrees }) => !agrees).map(({ what }) => what)).toEqual(
      ["longer sequences, mixtral-8x22b, five-way"]);
  });

  test.each(["mixtral-8x22b", "qwen2-57b-a14b", "mixtral-8x22b-g8t8"])(
    "%s: FSDP is slowest, folding fastest, the five-way layout between", (model) => {
      const rates = ["fsdp", "fsdp+ep", "five-way", "folded"].map((method) => tflops(model, method));
      expect(rates).toEqual(rates.toSorted((a, b) => a - b));
      expect(tflops(model, "tp+ep+dp")).toBeGreaterThan(tflops(model, "fsdp"));
      expect(tflops(model, "tp+ep+dp")).toBeLessThan(tflops(model, "five-way"));
    });

  test("FP8 is above BF16 with and without folding, and gains more with it", () => {
    const gain = (method: string) =>
      tflops("mixtral-8x22b", method, "fp8") / tflops("mixtral-8x22b", method);
    expect(gain("five-way")).toBeGreaterThan(1.1);
    expect(gain("folded")).toBeGreaterThan(gain("five-way"));
  });

  test("more GPUs for the same batch, and 128K tokens, cost MFU", () => {
    const falls = (table: string, ends: (run: (typeof folding)[number]) => boolean) => {
      const rates = predictions.filter(({ run }) =>
        run.table === table && run.model === "mixtral-8x22b" && run.method === "folded" && ends(run));
      return rates.map(({ plan }) => plan!.tflops);
    };
    const [few, many] = falls("F3 scaling", ({ gpus }) => gpus === 128 || gpus === 1024);
    // Published: 52.2 % to 44.9 %.
    expect(many! / few!).toBeGreaterThan(0.8);
    expect(many! / few!).toBeLessThan(0.9);
    const [short, long] = falls("F3 context", ({ seqlen }) => seqlen === 16384 || seqlen === 131072);
    // Published: 47.6 % to 42.9 %.
    expect(long! / short!).toBeGreaterThan(0.85);
    expect(long! / short!).toBeLessThan(0.95);
  });

  test("a layout that ran out of memory does not fit by prediction either", () => {
    const found = predictions.find(({ run }) => run.model === "llama3-8x70b" && run.method === "tp+ep+dp")!;
    expect(found.plan).toBeNull();
  });

  test("errors are as the page says", () => {
    const of = (table: string) => errors.find((each) => each.table === table)!;
    expect(of("F3").median).toBeLessThan(0.07);
    expect(of("F3").worst).toBeLessThan(0.36);
    expect(of("F3 scaling").worst).toBeLessThan(0.15);
    expect(of("F3 context").worst).toBeLessThan(0.15);
    expect(Math.abs(of("all").mean)).toBeLessThan(0.05);
  });

  test("of other GPUs and precisions with a stated layout are met within the errors of the page", () => {
    const others = PUBLISHED_RUNS.filter(({ table, layout }) =>
      (table === "F1" || table === "F2") && layout.tp !== undefined).map(predictRun);
    expect(others.length).toBe(16);
    const sizes = others.map(({ error }) => Math.abs(error!)).toSorted((a, b) => a - b);
    expect(sizes[8]).toBeLessThan(0.25);
    expect(sizes.at(-1)).toBeLessThan(0.7);
  });

  test("imply the operations per token that are counted here", () => {
    const counted = PUBLISHED_RUNS.filter(({ tokens }) => tokens !== undefined).map((run) => {
      const flops = trainingFlops(namedShape(run.model)!, run.seqlen);
      return { run, error: flops / ((run.tflops! * 1e12) / run.tokens!) - 1 };
    });
    expect(counted).toHaveLength(12);
    for (const { run, error } of counted) {
      // Those of Nemotron 3 Nano are counted 8 % higher than here; how is not said.
      const limit = run.model === "nemotron-3-nano" ? 0.08 : 0.02;
      expect(Math.abs(error), `${run.model} ${run.gpu} ${run.precision}`).toBeLessThan(limit);
    }
  });

  test.each<[string, number]>([
    ["mixtral-8x22b", 0.001], ["llama3-8x70b", 0.001], ["qwen2-57b-a14b", 0.08], ["mixtral-8x22b-g8t8", 0.12],
  ])("%s: the published folded layout is within %f of the best predicted", (model, within) => {
    const run = folding.find((each) => each.model === model && each.method === "folded")!;
    const own = requestOf(run);
    const published = searchPlans(own).plans[0]!;
    const best = searchPlans({ ...own, fixed: { microBatch: 1 } }).plans[0]!;
    expect(published.step.total / best.step.total - 1).toBeLessThan(within);
    expect(published.step.total).toBeGreaterThanOrEqual(best.step.total * (1 - 1e-9));
    if (within === 0.001) expect(formatLayout(best.layout)).toBe(formatLayout(published.layout));
  });
});

describe("a search", () => {
  const found = searchPlans(request("nemotron-3-nano", 64, { seqlen: 8192, globalBatch: 512, top: 50 }));

  test("gives plans that fit, the fastest first, each layout once, and that krait's own rules accept", () => {
    expect(found.plans.length).toBeGreaterThan(10);
    const times = found.plans.map(({ step }) => step.total);
    expect(times).toEqual(times.toSorted((a, b) => a - b));
    const axes = found.plans.map(({ layout: { tp, cp, pp, ep, etp }, fsdp }) =>
      [tp, cp, pp, ep, etp, fsdp].join());
    expect(new Set(axes).size).toBe(axes.length);
    for (const plan of found.plans) {
      const layout = parseLayout(formatLayout(plan.layout), 64);
      checkLayout(layout, preset("nemotron-3-nano-30b-a3b"), plan.sizes);
      expect(plan.memory.total).toBeLessThanOrEqual(USABLE_MEMORY * h100.memory);
      const { dp } = plan.layout;
      expect(plan.sizes.batch * plan.sizes.micro_batches * dp).toBe(512);
      const stages = parseFlexible(stageText(plan, namedShape("nemotron-3-nano")!));
      expect(stages).toHaveLength(plan.layout.pp * plan.layout.vpp);
      expect(stages.join("").split("t").length - 1).toBe(52);
    }
  });

  test("says where a step goes, and its rate is that of the step", () => {
    for (const { step, tflops, mfu, tokens } of found.plans) {
      const sum = STEP_PARTS.reduce((all, part) => all + step[part], 0);
      expect(Math.abs(sum / step.total - 1)).toBeLessThan(1e-12);
      expect(STEP_PARTS.every((part) => step[part] >= -1e-12)).toBe(true);
      expect(tokens).toBeCloseTo((512 * 8192) / 64 / step.total, 6);
      expect(tflops * 1e12).toBeCloseTo(trainingFlops(namedShape("nemotron-3-nano")!, 8192) * tokens, -6);
      expect(mfu).toBeCloseTo(tflops / 989, 9);
      expect(mfu).toBeLessThan(EFFICIENCIES.product);
    }
  });

  test("counts what it refused, and says why runners-up lose", () => {
    const refused = [...found.refused.values()].reduce((sum, count) => sum + count, 0);
    expect(found.searched).toBeGreaterThan(refused);
    expect([...found.refused.keys()]).toContain("more memory than the GPU has");
    const [best, second] = [found.plans[0]!, found.plans[1]!];
    const lost = losesBy(second, best);
    expect(lost.length).toBeGreaterThan(0);
    expect(lost.reduce((sum, { share }) => sum + share, 0)).toBeGreaterThanOrEqual(
      second.step.total / best.step.total - 1 - 12 * 0.0005);
  });

  test("names layouts whose expert exchange it takes to run beside computation", () => {
    for (const { layout, overlapExchange, step } of found.plans) {
      expect(formatLayout(layout).includes("overlap=on")).toBe(overlapExchange);
      if (overlapExchange) expect(step.ep).toBeGreaterThan(0);
    }
    expect(new Set(found.plans.map(({ overlapExchange }) => overlapExchange)).size).toBe(2);
  });

  test("keeps what is fixed", () => {
    const fixed = { tp: 2, pp: 2, ep: 8, microBatch: 1, recompute: "full" as const };
    for (const { layout, sizes, recompute } of searchPlans(request("nemotron-3-nano", 64, { fixed })).plans) {
      const { tp, pp, ep } = layout;
      expect({ tp, pp, ep, microBatch: sizes.batch, recompute }).toEqual(fixed);
    }
  });

  test.each<[string, Partial<PlanRequest>, string]>([
    ["nemotron-3-ultra", { gpus: 8 }, "fits 8 x h100: the smallest needs at least"],
    ["tiny", { gpus: 7, globalBatch: 4 }, "fills 7 x h100 with 4 sequences a step"],
    ["nemotron-3-nano", { gpus: 64, fixed: { ep: 3 } }, "most often, experts do not fill the grid"],
    ["tiny", { gpus: 64, precision: "nvfp4" }, "must be one of bf16, fp8, which h100 has, found nvfp4"],
  ])("%s with %o cannot be", (name, more, message) => {
    const search = () => searchPlans(request(name, 8, more));
    expect(search).toThrow(UsageError);
    expect(search).toThrow(message);
  });
});

describe("the cost of", () => {
  test("a product never beats its peak, and falls off with few rows", () => {
    const rate = (rows: number, out: number, input: number, groups = 1) =>
      (2 * rows * out * input * groups) / productTime(rows, out, input, groups, options);
    expect(rate(8192, 8192, 8192)).toBeLessThan(h100.peak.bf16! * EFFICIENCIES.product);
    expect(rate(8192, 8192, 8192)).toBeGreaterThan(0.6 * h100.peak.bf16!);
    expect(rate(64, 4096, 4096)).toBeLessThan(0.5 * rate(4096, 4096, 4096));
    // The same rows spread over more experts are slower.
    expect(rate(64, 2048, 2048, 64)).toBeLessThan(rate(1024, 2048, 2048, 4));
  });

  test("an exchange grows where experts leave the domain, and deduplication pays there", () => {
    const shape = namedShape("qwen3-235b-a22b")!;
    const time = (text: string) => {
      const layout = parseLayout(text);
      const costs = layerCosts(shape, layout, { batch: 1, seqlen: 4096, micro_batches: 8 }, options);
      return costs.of(shape.layers[1]!).forward.ep;
    };
    expect(time("dp=64,ep=8")).toBeLessThan(time("dp=64,ep=16"));
    expect(time("dp=64,ep=64,dispatch=flex")).toBeLessThan(0.7 * time("dp=64,ep=64"));
    expect([ranksInDomain(8, 1, 8), ranksInDomain(8, 2, 8), ranksInDomain(4, 16, 8)]).toEqual([8, 4, 1]);
  });

  test("stages is even: units are cut so that the slowest rank is fast", () => {
    expect(cutUnits([1, 1, 1, 1, 1, 1, 1, 1], 4, 1, 0, 0)).toEqual([2, 2, 2, 2]);
    // A head that costs three layers leaves the last rank with fewer.
    expect(cutUnits(Array.from({ length: 9 }, () => 1), 3, 1, 0, 3)!.at(-1)).toBe(1);
    const sizes = cutUnits(Array.from({ length: 61 }, () => 1), 8, 4, 0, 2)!;
    expect(sizes.reduce((sum, size) => sum + size, 0)).toBe(61);
    const loads = Array.from({ length: 8 }, (_, p) =>
      sizes.filter((_size, i) => i % 8 === p).reduce((sum, size) => sum + size, 0) + (p === 7 ? 2 : 0));
    expect(Math.max(...loads)).toBe(8);
    expect(cutUnits([1, 1], 4, 1, 0, 0)).toBeNull();
  });

  test("a Nemotron-H token is what the accounting counts, but for the scan's larger factor", () => {
    const config = preset("nemotron-3-nano-30b-a3b");
    const scan = 3 * 23 * (7 - 5) * 64 * 64 * 128;
    const conv = 3 * 23 * 2 * 4 * (64 * 64 + 2 * 8 * 128);
    expect(trainingFlops(shapeOf(config, "nano"), 4096)).toBeCloseTo(
      3 * forwardFlops(config, 2048) + scan - conv, -3);
  });
});

describe("the tables of", () => {
  test("GPUs: all have a source, and peaks that rise as numbers shrink", () => {
    for (const name of gpuNames()) {
      const gpu = gpuNamed(name.toUpperCase());
      expect(gpu.source).toContain("NVIDIA");
      const peaks = PLAN_PRECISIONS.map((precision) => gpu.peak[precision]).filter((peak) => peak !== null);
      expect(peaks).toEqual(peaks.toSorted((a, b) => a - b));
      expect(gpu.between).toBeLessThan(gpu.inside);
    }
    expect(() => gpuNamed("v100")).toThrow(
      "must be one of a100, h100, h200, b200, gb200, gb300, found \"v100\"");
    expect(() => peakOf(gpuNamed("a100"), "fp8")).toThrow("must be one of bf16, which a100 has, found fp8");
  });

  test.each([
    ["mixtral-8x22b", 140.6], ["llama3-8x70b", 465], ["qwen2-57b-a14b", 57.4], ["qwen3-30b-a3b", 30.5],
    ["qwen3-235b-a22b", 235], ["deepseek-v3", 671 + 11.5], ["nemotron-3-super", 123.6],
  ])("models: %s has %f billion parameters", (name, billions) => {
    expect(Math.abs(shapeParameters(namedShape(name)!) / 1e9 / billions - 1)).toBeLessThan(0.005);
  });

  test("names: all have a shape", () => {
    expect(shapeNames().every((name) => namedShape(name) !== null)).toBe(true);
    expect(namedShape("nope")).toBeNull();
  });
});
