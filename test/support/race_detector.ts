/**
 * wgsl_reflect's lockstep interpreter, with its limits worked around: `workgroupUniformLoad` is no barrier to
 * it, it overlooks a barrier that is the first statement of a block, it runs the body of a `while` once, and
 * it keeps one result per call for all invocations.
 */
import { CallExpr, detectRaces } from "wgsl_reflect/wgsl_reflect.module.js";

const BARRIERS = ["workgroupBarrier", "storageBarrier", "workgroupUniformLoad"];

/** For every function of linked WGSL: the words of its text and of all functions it calls. */
function wordsByFunction(code: string): Map<string, Set<string>> {
  const functions = [...code.matchAll(/\bfn\s+(\w+)[^{]*\{(?:[^\n]*\}\n|[\s\S]*?\n\})/g)];
  const words = new Map(functions.map((match) => [match[1]!, new Set(match[0].match(/\w+/g))] as const));
  for (let grown = true; grown;) {
    grown = false;
    for (const own of words.values()) {
      const before = own.size;
      for (const word of Array.from(own)) for (const called of words.get(word) ?? []) own.add(called);
      grown ||= own.size > before;
    }
  }
  return words;
}

/** Whether workgroup memory or a barrier can be reached from `name`. */
export function usesSharedMemory(code: string, name: string): boolean {
  const shared = [...code.matchAll(/var<workgroup>\s*(\w+)/g)].map((match) => match[1]!);
  const words = wordsByFunction(code).get(name);
  return [...BARRIERS, ...shared].some((word) => words?.has(word));
}

/** The positions of all barriers that `entry` can reach, as ranges of `code`. */
export function barriersOf(code: string, entry: string): [start: number, end: number][] {
  const reached = wordsByFunction(code).get(entry);
  const starts = [...code.matchAll(/\bfn\s+(\w+)/g)];
  return [...code.matchAll(/\bworkgroupBarrier\(\);/g)].flatMap(({ index, 0: text }) => {
    const owner = starts.findLast((start) => start.index < index)?.[1];
    const isReached = owner !== undefined && (owner === entry || reached?.has(owner));
    return isReached ? [[index, index + text.length] as [number, number]] : [];
  });
}

/**
 * Interprets every workgroup of a launch.
 * @param code linked WGSL without overrides
 * @param storage by binding number; holds the results afterwards
 * @returns one message per race, barrier in non-uniform control flow, or complaint of the interpreter
 */
export function findRaces(
  code: string, entry: string, workgroups: readonly number[],
  storage: Readonly<Record<number, ArrayBuffer>>, params: ArrayBuffer,
): string[] {
  let count = 0;
  const plain = code
    .replace(/^(.*)\bworkgroupUniformLoad\(&(\w+)\)(.*)$/gm, (...[, before, name, after]: string[]) => {
      const value = `uniform_load_${count++}`;
      return `workgroupBarrier(); let ${value} = ${name}; workgroupBarrier(); ${before}${value}${after}`;
    })
    .replace(/\bwhile \((.*)\) \{/g, "for (; $1; ) {")
    .replace(/\bworkgroupBarrier\(\);/g, (barrier) => `let before_barrier_${count++} = 0u; ${barrier}`);
  const words = wordsByFunction(plain);

  const messages: string[] = [];
  const complain = (...parts: unknown[]) => void messages.push(`The interpreter says: ${parts.join(" ")}`);
  const { log, warn, error } = console;
  const keep = CallExpr.prototype.setCachedReturnValue;
  try {
    Object.assign(console, { log: complain, warn: complain, error: complain });
    // The kept result is right only where it is the same for all invocations, as behind a barrier. Without it
    // a call is evaluated once more where its value is used.
    CallExpr.prototype.setCachedReturnValue = function (value) {
      if (BARRIERS.some((barrier) => words.get(this.name)?.has(barrier))) keep.call(this, value);
    };
    const groups = { 0: storage, 1: { 0: { uniform: params } } };
    const { races, errors } = detectRaces(plain, entry, [...workgroups], groups);
    messages.push(...races.map(({ message }) => message), ...errors);
  } finally {
    CallExpr.prototype.setCachedReturnValue = keep;
    Object.assign(console, { log, warn, error });
  }
  return [...new Set(messages)];
}
