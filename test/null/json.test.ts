import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { parseJson } from "../../src/io/json.ts";
import { FormatError } from "../../src/tensor/errors.ts";

type Case = string | { base64: string } | { repeat: string; times: number; tail: string };

const corpusFile = new URL("../fixtures/json_corpus.json", import.meta.url);
const corpus = JSON.parse(readFileSync(corpusFile, "utf8")) as { cases: Record<string, Case> };

function bytesOf(item: Case): Uint8Array {
  if (typeof item === "string") return new TextEncoder().encode(item);
  if ("base64" in item) return Uint8Array.from(Buffer.from(item.base64, "base64"));
  return new TextEncoder().encode(item.repeat.repeat(item.times) + item.tail);
}

function outcome(run: () => unknown): { value: unknown } | "refused" {
  try {
    return { value: run() };
  } catch (error) {
    if (error instanceof FormatError || error instanceof SyntaxError) return "refused";
    throw error;
  }
}

describe("the JSONTestSuite corpus", () => {
  const names = Object.keys(corpus.cases);
  const duplicates = ["y_object_duplicated_key", "y_object_duplicated_key_and_value"];

  test("is complete", () => {
    const count = (letter: string) => names.filter((name) => name.startsWith(letter)).length;
    expect([count("y_"), count("n_"), count("i_")]).toEqual([95, 188, 35]);
  });

  test.each(names.filter((name) => name.startsWith("y_")))("accepts %s", (name) => {
    const bytes = bytesOf(corpus.cases[name]!);
    const expected = JSON.parse(new TextDecoder().decode(bytes)) as unknown;
    expect(parseJson(bytes, { duplicateKeys: "last" })).toEqual(expected);
    if (duplicates.includes(name)) expect(() => parseJson(bytes)).toThrow(/found "a" a second time/);
    else expect(parseJson(bytes)).toEqual(expected);
  });

  test.each(names.filter((name) => name.startsWith("n_")))("refuses %s", (name) => {
    expect(() => parseJson(bytesOf(corpus.cases[name]!))).toThrow(FormatError);
    expect(() => parseJson(bytesOf(corpus.cases[name]!), { duplicateKeys: "last" })).toThrow(FormatError);
  });

  test.each(names.filter((name) => name.startsWith("i_")))("accepts or refuses %s", (name) => {
    const bytes = bytesOf(corpus.cases[name]!);
    const result = outcome(() => parseJson(bytes, { maxDepth: 600 }));
    if (result !== "refused") expect(result.value).toEqual(JSON.parse(new TextDecoder().decode(bytes)));
  });
});

describe("against JSON.parse", () => {
  test("reads back what JSON.stringify writes", () => {
    fc.assert(fc.property(fc.jsonValue(), fc.nat(4), (value, indent) => {
      expect(parseJson(JSON.stringify(value, null, indent))).toEqual(JSON.parse(JSON.stringify(value)));
    }));
  });

  test("agrees on damaged texts", () => {
    const text = '{"a": [1, -2.5e+3, "x\\u00e9\\n", {"b": null}], "c": true, "": 0}';
    const put = fc.constantFrom(..."[]{},:\"\\0-+.eEtn \n", "");
    const edit = fc.record({ at: fc.nat(text.length), drop: fc.nat(3), put });
    fc.assert(fc.property(fc.array(edit, { minLength: 1, maxLength: 3 }), (edits) => {
      let damaged = text;
      for (const { at, drop, put } of edits) damaged = damaged.slice(0, at) + put + damaged.slice(at + drop);
      const found = outcome(() => parseJson(damaged, { duplicateKeys: "last" }));
      expect(found).toEqual(outcome(() => JSON.parse(damaged)));
    }), { numRuns: 3000 });
  });
});

describe("beyond the standard", () => {
  test("non-finite numbers are read only when asked for, and not inside strings or words", () => {
    const text = '{"limit": [0.0, Infinity, -Infinity, NaN], "note": "Infinity"}';
    const value = { limit: [0, Infinity, -Infinity, NaN], note: "Infinity" };
    expect(parseJson(text, { nonFinite: true })).toEqual(value);
    expect(() => parseJson(text)).toThrow(/line 1, column 17: expected a value, found "Infinity, -I"/);
    for (const bad of ["Infinityx", "-NaN", "+Infinity", "infinity", "[Inf]"]) {
      expect(() => parseJson(bad, { nonFinite: true })).toThrow(FormatError);
    }
  });

  test("the depth limit counts arrays and objects", () => {
    const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);
    expect(parseJson(nested(3), { maxDepth: 3 })).toEqual([[[]]]);
    expect(() => parseJson(nested(4), { maxDepth: 3 })).toThrow(/nesting of at most 3 levels/);
    expect(() => parseJson(nested(257))).toThrow(/nesting of at most 256 levels/);
  });

  test("__proto__ is a member like any other", () => {
    const object = parseJson('{"__proto__": {"polluted": 1}, "constructor": 2}') as Record<string, unknown>;
    expect(Object.keys(object)).toEqual(["__proto__", "constructor"]);
    expect("polluted" in object).toBe(false);
    expect(() => parseJson('{"__proto__": 1, "__proto__": 2}')).toThrow(/"__proto__" a second time/);
  });

  test("messages name the file, the line and the column", () => {
    expect(() => parseJson('{\n  "a": 1,\n  "b" 2\n}', { what: "config.json" })).toThrow(
      "config.json: line 3, column 7: expected ':' after a key, found \"2\\n}\"",
    );
    expect(() => parseJson('{"a": 1', { what: "config.json" })).toThrow(
      "config.json: line 1, column 8: expected ',' or '}', found the end of the text",
    );
    const bytes = Uint8Array.of(0x22, 0xff, 0x22);
    expect(() => parseJson(bytes, { what: "x.json" })).toThrow("x.json: expected UTF-8 text");
  });
});
