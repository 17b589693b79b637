import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { blobFolder, memoryFolder, memorySource, readAll, urlFolder, urlSource } from "../../src/io/files.ts";
import { openFolder } from "../../src/io/files.node.ts";
import { encodeSafetensors, openSafetensors, openTensors, parseIndex } from "../../src/io/safetensors.ts";
import type { TensorEntry, TensorReader } from "../../src/io/safetensors.ts";
import { DTYPES, byteLengthOf, encodeFloat } from "../../src/tensor/dtype.ts";
import type { DType } from "../../src/tensor/dtype.ts";
import { DTypeError, FormatError, KraitError, UsageError } from "../../src/tensor/errors.ts";
import { sizeOf } from "../../src/tensor/ndarray.ts";

/** A file from a header (object or raw text) and a count of data bytes; `length` for the length field. */
function fileOf(header: unknown, dataBytes = 0, length?: bigint): Uint8Array {
  const text = new TextEncoder().encode(typeof header === "string" ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + text.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, length ?? BigInt(text.length), true);
  bytes.set(text, 8);
  return bytes;
}

function open(bytes: Uint8Array): Promise<TensorReader> {
  return openSafetensors(memorySource("m.safetensors", bytes));
}

function f32(shape: number[], ...offsets: number[]) {
  return { dtype: "F32", shape, data_offsets: offsets };
}

describe("well-formed files", () => {
  test("write, then read back in any order of entries", async () => {
    const weights = Float32Array.of(1, -2, 0.5, 3e38, -0, 7);
    const entries: TensorEntry[] = [
      { name: "ids", dtype: "I64", shape: [2], bytes: new Uint8Array(BigInt64Array.of(-5n, 9n).buffer) },
      { name: "b.weight", dtype: "BF16", shape: [2, 3], bytes: encodeFloat("BF16", weights) },
      { name: "a.weight", dtype: "F32", shape: [3, 2], bytes: async () => encodeFloat("F32", weights) },
      { name: "mask", dtype: "BOOL", shape: [3], bytes: Uint8Array.of(1, 0, 1) },
      { name: "scalar", dtype: "F32", shape: [], bytes: encodeFloat("F32", Float32Array.of(2.5)) },
      { name: "empty", dtype: "F16", shape: [0, 4], bytes: new Uint8Array(0) },
    ];
    const file = await encodeSafetensors(entries, { format: "pt", "a key": "ünï" });
    expect(await encodeSafetensors(entries.toReversed(), { "a key": "ünï", format: "pt" })).toEqual(file);
    expect(new DataView(file.buffer).getBigUint64(0, true) % 8n).toBe(0n);

    const reader = await open(file);
    expect(reader.metadata).toEqual({ "a key": "ünï", format: "pt" });
    expect([...reader.tensors.keys()]).toEqual(["ids", "a.weight", "scalar", "b.weight", "empty", "mask"]);
    expect(reader.info("b.weight")).toMatchObject({ dtype: "BF16", shape: [2, 3], size: 6, byteLength: 12 });
    expect(await reader.readTensorF32("a.weight")).toEqual(weights);
    expect(await reader.readTensorF32("a.weight", { start: 1, count: 2 })).toEqual(Float32Array.of(-2, 0.5));
    expect((await reader.readTensorF32("b.weight"))[2]).toBe(0.5);
    expect(await reader.readTensorF32("scalar")).toEqual(Float32Array.of(2.5));
    expect(await reader.readTensorF32("empty")).toEqual(new Float32Array(0));
    expect(await reader.readTensorI32("ids")).toEqual(Int32Array.of(-5, 9));
    expect(await reader.readTensorI32("mask", { start: 2, count: 1 })).toEqual(Int32Array.of(1));

    await expect(reader.readTensorF32("ids")).rejects.toThrow(/"ids": expected a float format, found I64/);
    await expect(reader.readTensorI32("scalar")).rejects.toThrow(DTypeError);
    await expect(reader.read("nothing")).rejects.toThrow('expected a tensor "nothing", found none');
    await expect(reader.read("ids", { start: 1, count: 2 })).rejects.toThrow(
      'tensor "ids": expected a range within 2 elements, found 2 elements from 1',
    );
  });

  test("any set of tensors survives the round trip", async () => {
    const dtypes = Object.keys(DTYPES) as DType[];
    const tensor = fc.record({
      name: fc.string({ maxLength: 8 }).filter((name) => name !== "__metadata__"),
      dtype: fc.constantFrom(...dtypes),
      shape: fc.array(fc.nat(4), { maxLength: 3 }),
      seed: fc.nat(255),
    }).filter(({ dtype, shape }) => byteLengthOf(dtype, sizeOf(shape)) !== null);
    const tensors = fc.uniqueArray(tensor, { selector: (entry) => entry.name, maxLength: 6 });
    await fc.assert(fc.asyncProperty(tensors, async (list) => {
      const entries = list.map(({ name, dtype, shape, seed }): TensorEntry => {
        const bytes = new Uint8Array(byteLengthOf(dtype, sizeOf(shape))!).map((_, i) => seed + i);
        return { name, dtype, shape, bytes };
      });
      const reader = await open(await encodeSafetensors(entries));
      expect(reader.tensors.size).toBe(entries.length);
      for (const { name, dtype, shape, bytes } of entries) {
        expect(reader.info(name)).toMatchObject({ dtype, shape });
        expect(await reader.read(name)).toEqual(bytes);
      }
    }), { numRuns: 200 });
  });

  test("headers padded with spaces, and an empty file of tensors, are fine", async () => {
    expect((await open(fileOf("{}"))).tensors.size).toBe(0);
    expect((await open(fileOf(`${JSON.stringify({ a: f32([1], 0, 4) })}    `, 4))).tensors.size).toBe(1);
  });

  test("half-byte formats are read by whole bytes", async () => {
    const reader = await open(fileOf({ q: { dtype: "F4", shape: [2, 4], data_offsets: [0, 4] } }, 4));
    expect((await reader.readTensorF32("q", { start: 2, count: 4 })).length).toBe(4);
    await expect(reader.read("q", { start: 1, count: 2 })).rejects.toThrow(/expected whole bytes of F4/);
  });

  test("the writer refuses what the reader would", async () => {
    const bytes = new Uint8Array(4);
    const one: TensorEntry = { name: "a", dtype: "F32", shape: [1], bytes };
    await expect(encodeSafetensors([one, one])).rejects.toThrow('tensor "a": expected each name once');
    await expect(encodeSafetensors([{ ...one, name: "__metadata__" }])).rejects.toThrow(UsageError);
    await expect(encodeSafetensors([{ ...one, shape: [2] }])).rejects.toThrow(
      'tensor "a": expected 8 bytes for F32 [2], found 4',
    );
    await expect(encodeSafetensors([{ ...one, dtype: "F4" }])).rejects.toThrow(/expected whole bytes of F4/);
  });
});

describe("damaged and hostile files", () => {
  const twice = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    + '"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}';
  const deep = `{"a":${"[".repeat(1000)}${"]".repeat(1000)}}`;
  test.each<[string, Uint8Array, RegExp]>([
    ["empty file", new Uint8Array(0), /expected 8 bytes of header length, found 0 bytes/],
    ["half a length field", new Uint8Array(4), /found 4 bytes/],
    ["header beyond the end", fileOf("{}", 0, 3n), /expected 3 bytes of header, found 2 \(truncated\?\)/],
    ["header of 2^64 - 1 bytes", fileOf("{}", 0, 2n ** 64n - 1n),
      /at most 100000000 bytes, found 18446744073709/],
    ["header just above the limit", fileOf("{}", 0, 100_000_001n), /found 100000001/],
    ["empty header", fileOf(""), /starts with "\{"/],
    ["header that is not UTF-8", fileOf("{").with(8, 0xff), /starts with "\{"/],
    ["header with a bad UTF-8 name", fileOf('{"X":1}').with(10, 0xff), /expected UTF-8 text/],
    ["header that is not JSON", fileOf("{abc}"), /line 1, column 2: expected a key in double quotes/],
    ["header that is an array", fileOf(" []"), /starts with "\{"/],
    ["header with a byte order mark", fileOf("\ufeff{}"), /starts with "\{"/],
    ["header followed by text", fileOf("{}x"), /expected the end of the text/],
    ["deep nesting", fileOf(deep), /nesting of at most 4 levels/],
    ["a name twice", fileOf(twice, 8), /each key once, found "a" a second time/],
    ["a hole", fileOf({ a: f32([1], 0, 4), b: f32([1], 8, 12) }, 12),
      /tensor "b".*after that of "a", found a hole of 4/],
    ["a hole at the start", fileOf({ a: f32([1], 4, 8) }, 8),
      /right after the header, found a hole of 4 bytes/],
    ["an overlap", fileOf({ a: f32([2], 0, 8), b: f32([2], 4, 12) }, 12),
      /tensor "b".*found an overlap of 4 bytes/],
    ["two names on one range", fileOf({ a: f32([1], 0, 4), b: f32([1], 0, 4) }, 4),
      /found an overlap of 4 bytes/],
    ["data cut off", fileOf({ a: f32([4], 0, 16) }, 15), /from its header, found \d+ bytes \(truncated\?\)/],
    ["data left over", fileOf({ a: f32([4], 0, 16) }, 17), /found 1 bytes more/],
    ["shape and bytes differ", fileOf({ a: f32([2, 2], 0, 12) }, 12),
      /tensor "a": expected 16 bytes for F32 \[2, 2\], found 12/],
    ["offsets backwards", fileOf({ a: f32([0], 4, 0) }, 4), /data_offsets in ascending order/],
    ["negative offset", fileOf({ a: f32([1], -4, 0) }, 4), /data_offsets of two integers >= 0/],
    ["fractional offset", fileOf({ a: f32([1], 0.5, 4.5) }, 5), /data_offsets of two integers/],
    ["three offsets", fileOf({ a: f32([1], 0, 4, 4) }, 4),
      /data_offsets of two/],
    ["offset above 2^53", fileOf({ a: f32([1], 2 ** 53, 2 ** 53 + 4) }, 4), /data_offsets of two integers/],
    ["product above 2^53", fileOf({ a: f32([2 ** 31, 2 ** 31], 0, 0) }), /at most 2\^53 - 1 elements/],
    ["product that wraps to 0 in 64 bits", fileOf({ a: f32([2 ** 32, 2 ** 32, 4], 0, 0) }),
      /at most 2\^53 - 1/],
    ["huge extent", fileOf({ a: f32([2 ** 33, 0], 0, 0) }), /integers from 0 to 2\^32/],
    ["negative extent", fileOf({ a: f32([-1, -4], 0, 16) }, 16), /a shape of at most 16 integers/],
    ["shape of strings", fileOf({ a: { dtype: "F32", shape: ["1"], data_offsets: [0, 4] } }, 4),
      /found \["1"\]/],
    ["seventeen dimensions", fileOf({ a: f32(Array<number>(17).fill(1), 0, 4) }, 4), /at most 16 integers/],
    ["odd count of half bytes", fileOf({ a: { dtype: "F4", shape: [3], data_offsets: [0, 2] } }, 2),
      /whole number of bytes/],
    ["unknown dtype", fileOf({ a: { dtype: "F31", shape: [1], data_offsets: [0, 4] } }, 4),
      /a dtype out of F64.*found "F31"/],
    ["dtype named like a method", fileOf({ a: { dtype: "toString", shape: [1], data_offsets: [0, 4] } }, 4),
      /found "toString"/],
    ["no dtype", fileOf({ a: { shape: [1], data_offsets: [0, 4] } }, 4),
      /tensor "a": expected a dtype.*found nothing/],
    ["a tensor that is a number", fileOf({ a: 7 }),
      /expected an object with dtype, shape and data_offsets, found 7/],
    ["metadata of numbers", fileOf({ __metadata__: { a: 1 } }),
      /__metadata__ "a": expected a string, found 1/],
    ["metadata that is a list", fileOf({ __metadata__: [] }), /__metadata__ to be an object of strings/],
  ])("%s", async (_, bytes, message) => {
    const error: unknown = await open(bytes).catch((caught: unknown) => caught);
    expect(error).toBeInstanceOf(FormatError);
    expect(String(error)).toMatch(/^FormatError: m\.safetensors/);
    expect(String(error)).toMatch(message);
  });

  test("whatever bytes are changed: a reader or a FormatError, never anything else", async () => {
    const good = await encodeSafetensors([
      { name: "a", dtype: "F32", shape: [2], bytes: new Uint8Array(8) },
      { name: "b", dtype: "F16", shape: [1, 3], bytes: new Uint8Array(6) },
    ], { format: "pt" });
    const edit = fc.record({ at: fc.nat(good.length - 15), to: fc.nat(255) });
    const edits = fc.array(edit, { minLength: 1, maxLength: 3 });
    await fc.assert(fc.asyncProperty(edits, fc.nat(good.length), async (list, keep) => {
      const bad = good.slice(0, keep % 3 === 0 ? keep : good.length);
      for (const { at, to } of list) if (at < bad.length) bad[at] = to;
      const result = await open(bad).catch((error: unknown) => error);
      if (result instanceof Error) expect(result).toBeInstanceOf(FormatError);
    }), { numRuns: 2000 });
  });

  test("a failed open closes the file", async () => {
    let closed = 0;
    const source = { ...memorySource("x", fileOf("[]")), close: async () => void closed++ };
    await expect(openSafetensors(source)).rejects.toThrow(FormatError);
    expect(closed).toBe(1);
  });
});

describe("sharded checkpoints", async () => {
  const shard = (name: string, value: number) => encodeSafetensors([
    { name, dtype: "F32", shape: [1], bytes: encodeFloat("F32", Float32Array.of(value)) },
  ]);
  const index = (map: Record<string, unknown>) =>
    new TextEncoder().encode(JSON.stringify({ weight_map: map }));
  const good = {
    "model.safetensors.index.json": index({ a: "m-1.safetensors", b: "m-2.safetensors" }),
    "m-1.safetensors": await shard("a", 1),
    "m-2.safetensors": await shard("b", 2),
  };

  test("are read as one", async () => {
    const reader = await openTensors(memoryFolder("ckpt", good));
    expect([...reader.tensors.keys()]).toEqual(["a", "b"]);
    expect(await reader.readTensorF32("b")).toEqual(Float32Array.of(2));
    const files = Object.entries(good).map(([name, bytes]) => new File([bytes], name));
    const dropped = await openTensors(blobFolder("drop", files));
    expect(await dropped.readTensorF32("a")).toEqual(Float32Array.of(1));
    await reader.close();
  });

  test.each([
    ["a missing shard", { ...good, "m-2.safetensors": undefined },
      /ckpt: expected the shard m-2\.safetensors/],
    ["no weights at all", {}, /ckpt: expected model\.safetensors or .*index\.json, found neither/],
    ["a tensor in the wrong shard", { ...good, "m-1.safetensors": await shard("b", 3) },
      /m-1\.safetensors: tensor "b": expected in m-2\.safetensors/],
    ["a tensor not in the index", { ...good, "m-1.safetensors": await shard("c", 3) },
      /"c": expected nowhere/],
    ["a tensor missing from its shard", { ...good, "m-1.safetensors": await encodeSafetensors([]) },
      /m-1\.safetensors: tensor "a": expected here by .*index\.json, found none/],
    ["a truncated shard", { ...good, "m-1.safetensors": good["m-1.safetensors"].slice(0, -1) }, /truncated/],
  ])("%s", async (_, files, message) => {
    const present = Object.fromEntries(Object.entries(files).filter(([, bytes]) => bytes !== undefined));
    const opened = openTensors(memoryFolder("ckpt", present as Record<string, Uint8Array>));
    await expect(opened).rejects.toThrow(message);
    await expect(opened).rejects.toThrow(FormatError);
  });

  test.each(["../m.safetensors", "/m.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", "",
    "C:m.safetensors", "m.bin", "m\u0000.safetensors", 7, null])("shard name %j stays outside", (name) => {
    expect(() => parseIndex(index({ a: name }))).toThrow(/"a": expected a plain \.safetensors file name/);
  });

  test("an index that is no index", () => {
    for (const text of ["[]", "{}", '{"weight_map": 3}', "{"]) {
      expect(() => parseIndex(text)).toThrow(FormatError);
    }
  });
});

describe("byte sources", () => {
  test("ranges outside a file are refused", async () => {
    const source = memorySource("m", Uint8Array.of(1, 2, 3));
    expect(await source.read(1, 2)).toEqual(Uint8Array.of(2, 3));
    await expect(source.read(2, 2)).rejects.toThrow(/^m: expected 2 bytes at offset 2, found .* 3 bytes/);
    await expect(source.read(-1, 2)).rejects.toThrow(UsageError);
    await expect(readAll(source, 2)).rejects.toThrow("m: expected at most 2 bytes, found 3");
  });

  test("local files, and names that would leave the folder", async () => {
    const folder = openFolder(new URL("../fixtures", import.meta.url).pathname);
    const source = (await folder.open("nvfp4.safetensors"))!;
    const bytes = readFileSync(new URL("../fixtures/nvfp4.safetensors", import.meta.url));
    expect(Buffer.from(await readAll(source, 1e6)).equals(bytes)).toBe(true);
    await source.close();
    expect(await folder.open("nothing.safetensors")).toBeNull();
    await expect(folder.open("../null/json.test.ts")).rejects.toThrow(/expected a plain file name/);
    const parent = openFolder(new URL("..", import.meta.url).pathname);
    await expect(parent.open("fixtures")).rejects.toThrow("fixtures: expected a file, found something else");
  });

  const content = Uint8Array.from({ length: 50 }, (_, i) => i);
  const serve = (behaviour: "ranges" | "whole" | "short" | "no total") => {
    const requests: string[] = [];
    const request = (async (url: string, init: { headers: { Range: string } }) => {
      requests.push(`${url} ${init.headers.Range}`);
      if (url.endsWith("missing")) return new Response(null, { status: 404 });
      if (url.endsWith("broken")) return new Response(null, { status: 500 });
      if (behaviour === "whole") return new Response(content);
      const [from, to] = init.headers.Range.slice(6).split("-").map(Number) as [number, number];
      const body = content.slice(from, behaviour === "short" && to > 0 ? to : to + 1);
      const total = behaviour === "no total" ? "*" : content.length;
      const headers = { "Content-Range": `bytes ${from}-${to}/${total}` };
      return new Response(body, { status: 206, headers });
    }) as unknown as typeof fetch;
    return { request, requests };
  };

  test("a web server is asked for ranges", async () => {
    const { request, requests } = serve("ranges");
    const source = (await urlFolder("https://example.org/model/", request).open("a b.bin"))!;
    expect(source.size).toBe(50);
    expect(await source.read(10, 3)).toEqual(Uint8Array.of(10, 11, 12));
    expect((await source.read(4, 0)).length).toBe(0);
    expect(requests).toEqual([
      "https://example.org/model/a%20b.bin bytes=0-0",
      "https://example.org/model/a%20b.bin bytes=10-12",
    ]);
    expect(await urlSource("https://example.org/missing", request)).toBeNull();
    await expect(urlSource("https://example.org/broken", request)).rejects.toThrow(/found HTTP status 500/);
    await expect(urlFolder("https://example.org", request).open("../x")).rejects.toThrow(UsageError);
  });

  test("a server without ranges is asked once; answers that are too short are noticed", async () => {
    const whole = serve("whole");
    const source = (await urlSource("https://example.org/x", whole.request))!;
    expect(await source.read(48, 2)).toEqual(Uint8Array.of(48, 49));
    expect(whole.requests.length).toBe(1);
    const short = (await urlSource("https://example.org/x", serve("short").request))!;
    await expect(short.read(10, 3)).rejects.toThrow("expected 3 bytes at offset 10, found 2 (status 206)");
    await expect(urlSource("https://example.org/x", serve("no total").request)).rejects.toThrow(KraitError);
  });
});
