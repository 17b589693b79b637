/** Writes ONNX models: the few fields of onnx.proto (IR version 8) that the bench needs. */

export type Attribute = number | string | readonly number[] | { readonly float: number };

export interface Node {
  readonly op: string;
  /** Names of tensors; "" leaves an optional one out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly domain?: string;
  /** Whole numbers become ints; `{ float }` a float. */
  readonly attributes?: Readonly<Record<string, Attribute>>;
}

export interface Graph {
  readonly nodes: readonly Node[];
  readonly inputs: Readonly<Record<string, readonly number[]>>;
  readonly outputs: readonly string[];
  readonly constants: Readonly<Record<string, {
    readonly shape: readonly number[];
    /** Uint16Array: f16 numbers by their bits. */
    readonly data: Float32Array | Uint16Array | Uint8Array | BigInt64Array;
  }>>;
}

const OPSET = 21;
/** Numbers of element types; `to` of a Cast takes one. */
export const FLOAT = 1;
const UINT8 = 2;
const INT64 = 7;
export const FLOAT16 = 10;

type Bytes = Uint8Array;

/** The bytes of a model; its inputs and outputs are f32. */
export function encodeModel(graph: Graph): Bytes {
  const opset = (domain: string, version: number) => message(text(1, domain), int(2, version));
  return message(
    int(1, 8),
    field(7, encodeGraph(graph)),
    field(8, opset("", OPSET)),
    field(8, opset("com.microsoft", 1)),
  );
}

function encodeGraph({ nodes, inputs, outputs, constants }: Graph): Bytes {
  return message(
    ...nodes.map((node) => field(1, encodeNode(node))),
    text(2, "bench"),
    ...Object.entries(constants).map(([name, { shape, data }]) => field(5, message(
      ...shape.map((n) => int(1, n)), int(2, elementType(data)), text(8, name),
      field(9, new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
    ))),
    ...Object.entries(inputs).map(([name, shape]) => field(11, valueInfo(name, shape))),
    ...outputs.map((name) => field(12, valueInfo(name, null))),
  );
}

function elementType(data: Graph["constants"][string]["data"]): number {
  if (data instanceof Float32Array) return FLOAT;
  if (data instanceof Uint16Array) return FLOAT16;
  return data instanceof Uint8Array ? UINT8 : INT64;
}

function valueInfo(name: string, shape: readonly number[] | null): Bytes {
  const dims = shape === null ? [] : [field(2, message(...shape.map((n) => field(1, int(1, n)))))];
  return message(text(1, name), field(2, field(1, message(int(1, FLOAT), ...dims))));
}

function encodeNode({ op, inputs, outputs, domain = "", attributes = {} }: Node): Bytes {
  return message(
    ...inputs.map((name) => text(1, name)),
    ...outputs.map((name) => text(2, name)),
    text(4, op),
    ...Object.entries(attributes).map(([name, value]) => field(5, encodeAttribute(name, value))),
    text(7, domain),
  );
}

function encodeAttribute(name: string, value: Attribute): Bytes {
  if (typeof value === "number") return message(text(1, name), int(3, value), int(20, 2));
  if (typeof value === "string") return message(text(1, name), text(4, value), int(20, 3));
  if ("float" in value) {
    return message(text(1, name), tag(2, 5), new Uint8Array(Float32Array.of(value.float).buffer), int(20, 1));
  }
  return message(text(1, name), ...value.map((n) => int(8, n)), int(20, 7));
}

function message(...parts: readonly Bytes[]): Bytes {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let end = 0;
  for (const part of parts) {
    bytes.set(part, end);
    end += part.length;
  }
  return bytes;
}

const tag = (number: number, wire: number): Bytes => varint((number << 3) | wire);
const int = (number: number, value: number): Bytes => message(tag(number, 0), varint(value));
const field = (number: number, body: Bytes): Bytes => message(tag(number, 2), varint(body.length), body);
const text = (number: number, value: string): Bytes => field(number, new TextEncoder().encode(value));

/** Seven bits a byte, the lowest first; negative numbers as 64 bits. */
function varint(value: number): Bytes {
  const bytes: number[] = [];
  for (let rest = BigInt.asUintN(64, BigInt(value)); ; rest >>= 7n) {
    if (rest < 128n) return Uint8Array.from([...bytes, Number(rest)]);
    bytes.push(Number(rest & 127n) | 128);
  }
}
