// A classic script in the head: the theme must stand before anything is painted.
(() => {
  const chosen = localStorage.getItem("mope-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
