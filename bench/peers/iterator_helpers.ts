/** The iterator helpers that jax-js calls and Node before 22 lacks: map, filter, some, every, toArray. */
const prototype = Object.getPrototypeOf(Object.getPrototypeOf([][Symbol.iterator]())) as object;
type Visit = (value: unknown, index: number) => unknown;

const helpers = {
  *map(this: Iterable<unknown>, visit: Visit) {
    let i = 0;
    for (const value of this) yield visit(value, i++);
  },
  *filter(this: Iterable<unknown>, visit: Visit) {
    let i = 0;
    for (const value of this) if (visit(value, i++)) yield value;
  },
  some(this: Iterable<unknown>, visit: Visit): boolean {
    let i = 0;
    for (const value of this) if (visit(value, i++)) return true;
    return false;
  },
  every(this: Iterable<unknown>, visit: Visit): boolean {
    let i = 0;
    for (const value of this) if (!visit(value, i++)) return false;
    return true;
  },
  toArray(this: Iterable<unknown>): unknown[] {
    return [...this];
  },
};

/** Adds the missing ones. */
export function addIteratorHelpers(): void {
  for (const [name, value] of Object.entries(helpers)) {
    if (name in prototype) continue;
    Object.defineProperty(prototype, name, { value, configurable: true, writable: true });
  }
}
