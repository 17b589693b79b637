import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { flopsByLayer, forwardFlops } from "../../src/models/accounting.ts";
import { parseConfig } from "../../src/models/config.ts";
import { preset, presetNames } from "../../src/models/presets.ts";
import { checkModel, parseLayout } from "../../src/parallel/layout.ts";
import {
  balancedStages, formatFlexible, formatHybrid, isFlexible, parseFlexible, parseHybrid, partition,
  placeOfStage, stageAt, stagesOf,
} from "../../src/parallel/stages.ts";
import { UsageError } from "../../src/tensor/errors.ts";

const layers = (count: number, mtp = false) => parseConfig({
  hybrid_override_pattern: "-".repeat(count), hidden_size: 8, vocab_size: 8, intermediate_size: 8,
  ...(mtp ? { num_nextn_predict_layers: 1, mtp_hybrid_override_pattern: "-" } : {}),
});
const cutsOf = (text: string, config: ReturnType<typeof layers>) =>
  stagesOf(parseLayout(text), config).map(({ from, to }) => to - from);

describe("layout strings", () => {
  const LONG = ["Ettt", ...Array<string>(29).fill("tt"), "m", "L"];
  test.each([
    ["Et*3|(tt|)*29,m|L", LONG, "Et*3|(tt|)*29m|L"],
    ["EttL", ["EttL"], "EttL"],
    ["E|t * 4|m*2|L", ["E", "tttt", "mm", "L"], "E|t*4|mm|L"],
    ["Et||tL", ["Et", "", "tL"], "Et||tL"],
    ["E(t|(tt|)*2)*2L", ["Et", "tt", "tt", "t", "tt", "tt", "L"], "Et|(tt|)*2t|(tt|)*2L"],
    ["Et|(t|)*3tL", ["Et", "t", "t", "t", "tL"], "Et|(t|)*3tL"],
    ["E||||tL", ["E", "", "", "", "tL"], "E|(|)*3tL"],
  ])("%s", (text, stages, printed) => {
    expect(isFlexible(text)).toBe(true);
    expect(parseFlexible(text)).toEqual(stages);
    expect(formatFlexible(stages)).toBe(printed);
    expect(parseFlexible(printed)).toEqual(stages);
  });

  test("any stages are printed and read back", () => {
    const middle = fc.array(fc.nat(5).map((count) => "t".repeat(count)), { maxLength: 12 });
    fc.assert(fc.property(middle, fc.boolean(), fc.boolean(), (found, mtp, alone) => {
      const stages = [...found, mtp ? "m" : "", alone ? "L" : "tL"].filter((_, i, all) =>
        !(mtp && !alone && i === all.length - 2));
      stages[0] = `E${stages[0]}`;
      expect(parseFlexible(formatFlexible(stages))).toEqual(stages);
    }), { numRuns: 300, seed: 5 });
  });

  test.each([
    ["tE|L", "\"E is first, once\": expected E..., found tE."],
    ["|Et|L", "\"E is first, once\": expected E..., found nothing."],
    ["Et|EtL", "\"E is first, once\""],
    ["Et|t", "\"L is last, once\": expected ...L, found t."],
    ["Et|tL|", "\"L is last, once\": expected ...L, found nothing."],
    ["EL|tL", "\"L is last, once\""],
    ["Em|tL", "\"every m is after all t\": expected t...m, found Em|tL."],
    ["Et|m|mL", "\"all m are in one stage\": expected one, found 2."],
    ["Et|x|L", "cannot be read: expected E, t, m, L, |, or a repetition of them, found \"x|L\"."],
    ["Et*|L", "cannot be read: expected * and a number above 0, found \"*|L\"."],
    ["Et*0|L", "cannot be read: expected * and a number above 0, found \"*0|L\"."],
    ["E(tt|*2L", "cannot be read: expected a closing parenthesis, found its end."],
    ["Ett)L", "cannot be read: expected E, t, m, L, |, or a repetition of them, found \")L\"."],
    ["E((((t*99)*99)*99)*99)L", "cannot be read: expected at most 65536 symbols, found \"*99)*99)L\"."],
  ])("%s is refused", (text, message) => {
    expect(() => parseFlexible(text)).toThrow(UsageError);
    expect(() => parseFlexible(text)).toThrow(message);
  });

  test("become stages of a model", () => {
    expect(stagesOf(parseLayout("pp=2,vpp=2,stages=Et|tt||mL"), layers(3, true))).toEqual([
      { from: 0, to: 1, embedding: true, mtp: false, head: false },
      { from: 1, to: 3, embedding: false, mtp: false, head: false },
      { from: 3, to: 3, embedding: false, mtp: false, head: false },
      { from: 3, to: 3, embedding: false, mtp: true, head: true },
    ]);
    expect(stagesOf(parseLayout("pp=4,stages=E|ttt|m|L"), layers(3, true)).map(({ mtp }) => mtp))
      .toEqual([false, false, true, false]);
    expect(stagesOf(parseLayout("stages=EttmL"), layers(2, true))).toEqual([
      { from: 0, to: 2, embedding: true, mtp: true, head: true },
    ]);
    expect(cutsOf("pp=16,vpp=2,stages=Et*3|(tt|)*29,m|L", layers(61, true)))
      .toEqual([3, ...Array<number>(29).fill(2), 0, 0]);
  });

  test.each([
    ["pp=2,stages=Et|t|tL", layers(3), "\"there are pp * vpp stages\": expected 2 * 1, found 3."],
    ["pp=2,stages=Et|tL", layers(3), "\"there is one t for each layer\": expected 3 layers, found 2."],
    ["pp=2,stages=Et|tL", layers(2, true),
      "\"there is an m where the model has a prediction block\": expected m, found none."],
    ["pp=2,stages=Et|tmL", layers(2),
      "\"there is an m where the model has a prediction block\": expected no m, found one."],
    ["pp=2,vpp=2,stages=Et|t|m|L", layers(2, true),
      "\"the prediction block is not on the first pipeline rank\": expected ranks 1 to 1, found rank 0."],
    ["pp=3,vpp=2,stages=Ett|m||||L", layers(2, true),
      "\"the prediction block is in the last chunk of its rank\": expected stages from 3 on, found stage 1."],
  ])("%s is refused", (text, config, message) => {
    expect(() => checkModel(parseLayout(text), config)).toThrow(message);
  });
});

describe("patterns with stages", () => {
  test.each([
    ["M-M-|M-M*-/MM/MM", ["M-M-", "M-M*-"], ["MM", "MM"]],
    ["MEM", ["MEM"], []],
    ["M||GD+", ["M", "", "GD+"], []],
  ])("%s", (text, stages, depths) => {
    expect(isFlexible(text)).toBe(false);
    expect(parseHybrid(text)).toEqual({ stages, depths });
    expect(formatHybrid({ stages, depths })).toBe(text);
  });

  test.each([
    ["M-x", "\"a pattern has known letters\": expected M*-EGD+, | and /, found \"x\" in \"M-x\"."],
    ["M-/M|M", "\"prediction depths lie in one stage\": expected no | after /, found M|M."],
    ["M-/MM/M", "\"prediction depths are equal\": expected MM, found M."],
    ["M-/", "\"prediction depths are equal\": expected layers, found none."],
  ])("%s is refused", (text, message) => {
    expect(() => parseHybrid(text)).toThrow(UsageError);
    expect(() => parseHybrid(text)).toThrow(message);
  });

  test("become stages of a model", () => {
    const unit = preset("unit");
    expect(stagesOf(parseLayout("pp=2,stages=ME*|-M"), unit)).toEqual([
      { from: 0, to: 3, embedding: true, mtp: false, head: false },
      { from: 3, to: 5, embedding: false, mtp: true, head: true },
    ]);
    expect(cutsOf("pp=3,stages=|ME*-|M/*E/*E", unit)).toEqual([0, 4, 1]);
    expect(() => stagesOf(parseLayout("pp=2,stages=ME|-M"), unit))
      .toThrow("\"a pattern with stages is the model's\": expected ME*-M, found ME-M.");
    expect(() => stagesOf(parseLayout("pp=2,stages=ME*|-M/M"), unit))
      .toThrow("\"a pattern with stages has the model's prediction block\": expected *E, found M.");
    expect(() => stagesOf(parseLayout("pp=2,stages=ME*-M"), unit))
      .toThrow("\"there are pp * vpp stages\": expected 2 * 1, found 1.");
  });
});

describe("cuts of equal cost", () => {
  test.each([
    [[1, 1, 1, 1], 2, [2, 2]],
    [[5, 1, 1, 1, 1, 1], 3, [1, 2, 3]],
    [[1, 1, 1, 9], 3, [1, 2, 1]],
    [[2, 2, 2], 3, [1, 1, 1]],
    [[1, 2, 3], 1, [3]],
    [[0, 0, 0], 2, [1, 2]],
  ])("%j in %d", (costs, count, lengths) => {
    const found = partition(costs, count);
    const worst = (cut: readonly number[]) => {
      let at = 0;
      return Math.max(...cut.map((length) => costs.slice(at, at += length).reduce((a, b) => a + b, 0)));
    };
    expect(found.reduce((a, b) => a + b)).toBe(costs.length);
    expect(worst(found)).toBe(worst(lengths));
    expect(found).toEqual(lengths);
  });

  test("no cut of small chains is better", () => {
    const chains = fc.array(fc.nat(20), { minLength: 4, maxLength: 7 });
    fc.assert(fc.property(chains, fc.integer({ min: 1, max: 4 }),
      (costs, count) => {
        const price = (lengths: readonly number[]): [number, number] => {
          let at = 0;
          const sums = lengths.map((length) => costs.slice(at, at += length).reduce((a, b) => a + b, 0));
          return [Math.max(...sums), sums.reduce((total, sum) => total + sum * sum, 0)];
        };
        const all = (left: number, runs: number): number[][] => runs === 1 ? [[left]]
          : Array.from({ length: left - runs + 1 }, (_, i) =>
            all(left - i - 1, runs - 1).map((rest) => [i + 1, ...rest])).flat();
        const best = all(costs.length, count).map(price)
          .sort(([a, b], [c, d]) => a - c || b - d)[0];
        expect(price(partition(costs, count))).toEqual(best);
      }), { numRuns: 200, seed: 3 });
  });

  test("every published model is cut so that no stage has much more than its share", () => {
    for (const name of presetNames()) {
      const config = preset(name);
      const { layers: costs, mtp, head } = flopsByLayer(config, 2048);
      const total = forwardFlops(config, 2048, config.num_nextn_predict_layers);
      const count = costs.length > 40 ? 4 : 2;
      const stages = balancedStages(config, count);
      expect(stages[0]!.from).toBe(0);
      stages.forEach(({ from, to, ...holds }, i) => {
        const isLast = i === count - 1;
        expect(to).toBeGreaterThan(from);
        expect(stages[i + 1]?.from ?? costs.length).toBe(to);
        expect(holds).toEqual(
          { embedding: i === 0, head: isLast, mtp: isLast && config.num_nextn_predict_layers > 0 });
        const own = costs.slice(from, to).reduce((a, b) => a + b, 0);
        if (!isLast) expect(own, name).toBeLessThan(total / count + 2 * Math.max(...costs));
        // The head and the prediction block leave the last stage fewer layers.
        if (isLast && count === 4) expect(own + head + mtp, name).toBeLessThan(total / count * 1.6);
      });
    }
  });

  test("more stages than layers are refused", () => {
    expect(() => balancedStages(layers(3), 4)).toThrow("expected at most 3 stages, found 4.");
  });
});

test("a rank's chunks are pp stages apart", () => {
  const layout = { pp: 4 };
  expect([0, 3, 4, 7].map((stage) => placeOfStage(layout, stage))).toEqual([
    { rank: 0, chunk: 0 }, { rank: 3, chunk: 0 }, { rank: 0, chunk: 1 }, { rank: 3, chunk: 1 },
  ]);
  for (let stage = 0; stage < 12; stage++) {
    const { rank, chunk } = placeOfStage(layout, stage);
    expect(stageAt(layout, rank, chunk)).toBe(stage);
  }
});
