/** Elements are built here and nowhere else: whatever a model or a user wrote becomes a text node, never HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element. `props` are attributes; `onNAME` are listeners; true and false set and leave out an attribute.
 * Children that are neither nodes nor null become text.
 */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function s(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** The element of the page with this id. */
export function byId(id) {
  return document.getElementById(id);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2).toLowerCase(), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
