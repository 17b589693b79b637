import { expect, test } from "vitest";
import { CASES } from "../../bench/peers/cases.ts";
import { encodeModel } from "../../bench/peers/onnx.ts";
import {
  comparison, formatRequest, lineSplitter, parseReply, parseRequest, relativeError, repetitions, slope,
  spread,
} from "../../bench/peers/protocol.ts";

test("every request is read back as it was written", () => {
  for (const request of [
    { verb: "prepare", name: "ssd_512" }, { verb: "run", n: 12 }, { verb: "sample", indices: [0, 7, 9] },
    { verb: "quit" },
  ] as const) {
    expect(parseRequest(formatRequest(request))).toEqual(request);
  }
});

test.each(["", "run", "run 0", "run 1.5", "run 3 4", "sample 1,", "quit now", "prepare", "stop"])(
  "the request %j is refused", (line) => {
    expect(() => parseRequest(line)).toThrow(`found "${line}"`);
  });

test("replies: numbers, errors, and NaN that JSON cannot say", () => {
  expect(parseReply('{"ok":true,"numbers":[1.5,2],"note":"n"}'))
    .toEqual({ ok: true, numbers: [1.5, 2], note: "n" });
  expect(parseReply('{"ok":false,"error":"no device"}')).toEqual({ ok: false, error: "no device" });
  const line = JSON.stringify({ ok: true, numbers: [NaN, 1], note: "" });
  expect(parseReply(line)).toEqual({ ok: true, numbers: [NaN, 1], note: "" });
  for (const bad of ["", "null", "ok", '{"ok":true}', '{"ok":false}', '{"ok":1,"numbers":[],"note":""}']) {
    expect(() => parseReply(bad)).toThrow("a JSON object with \"ok\"");
  }
});

test("lines that arrive in pieces are put together", () => {
  const lines: string[] = [];
  const split = lineSplitter((line) => lines.push(line));
  for (const piece of ["ab", "c\nd\n\ne", "f", "\ng"]) split(piece);
  expect(lines).toEqual(["abc", "d", "ef"]);
});

test("median, spread and ratio", () => {
  expect(spread([3, 1, 2])).toEqual({ median: 2, min: 1, max: 3 });
  expect(spread([4, 1, 3, 2])).toEqual({ median: 2.5, min: 1, max: 4 });
  expect(comparison([2, 1, 3], [9, 5, 8])).toEqual({
    ms: 2, min_ms: 1, max_ms: 3, peer_ms: 8, peer_min_ms: 5, peer_max_ms: 9, ratio: 4, runs: 3,
  });
});

test("relative errors are of the largest expected element, or of the largest change", () => {
  expect(relativeError([1, 2.5, -4], [1, 2, -4])).toBe(0.125);
  expect(relativeError([10.5, 11], [10, 11], [9, 9])).toBe(0.25);
  expect(relativeError([1, NaN, 2], [1, 1, 2])).toBeNaN();
  expect(relativeError([1], [1, 2])).toBeNaN();
});

test("repetitions fill a round and stay in their limits", () => {
  expect(repetitions(10, 100, 24)).toBe(10);
  expect(repetitions(1000, 100, 24)).toBe(1);
  expect(repetitions(0, 100, 24)).toBe(24);
});

test("the slope leaves out what every run costs, and refuses a chain that costs nothing", async () => {
  expect(await slope(5, async (links) => 40 + 3 * links)).toBe(3);
  expect(await slope(1, async (links) => 40 + 3 * links)).toBe(3);
  await expect(slope(5, async () => 40)).rejects.toThrow("never took longer");
});

test("a model's bytes", () => {
  const model = encodeModel({
    nodes: [{ op: "A", inputs: ["x"], outputs: ["y"], attributes: { n: -1, f: { float: 1 } } }],
    inputs: { x: [300] }, outputs: ["y"], constants: {},
  });
  const text = Buffer.from(model).toString("hex");
  expect(text.startsWith("08083a")).toBe(true); // ir_version 8, then the graph
  expect(text).toContain("0a016e18ffffffffffffffffff01a00102"); // "n": an int of 64 bits
  expect(text).toContain("0a0166150000803fa00101"); // "f": a float
  expect(text).toContain("5a100a0178120b0a09080112050a0308ac02"); // the graph's input x, f32 [300]
});

test("a case's inputs are the same each time, centred, and scaled as asked", () => {
  const wanted = CASES.find(({ name }) => name === "matmul_f32_512")!;
  const [a, b] = [wanted.inputs(), wanted.inputs()];
  expect(a).toEqual(b);
  const { data } = a["w"]!;
  const mean = data.reduce((sum, x) => sum + x, 0) / data.length;
  const variance = data.reduce((sum, x) => sum + x * x, 0) / data.length;
  expect(Math.abs(mean)).toBeLessThan(3e-4);
  expect(variance * 512).toBeCloseTo(1, 1);
});

test("the expected elements are a product's", () => {
  const wanted = CASES.find(({ name }) => name === "matmul_f32_512")!;
  const data = Float32Array.from({ length: 512 ** 2 }, (_, i) => +(i % 513 === 0));
  const eye = { shape: [512, 512], data };
  const { w } = wanted.inputs();
  const { indices, values } = wanted.expected({ x: eye, w: w! });
  expect(new Set(indices).size).toBe(indices.length);
  expect(values).toEqual(indices.map((i) => w!.data[i]));
});
