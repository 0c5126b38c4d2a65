// jmm_fast._C: importing it registers the CPU kernels with torch. The Python functions only report and choose the
// instruction set, within the limited API so that one binary serves every Python from 3.11 on.

#include <Python.h>

#include <exception>

#include "isa.h"

namespace {

PyObject* text(std::string_view view) {
  return PyUnicode_FromStringAndSize(view.data(), static_cast<Py_ssize_t>(view.size()));
}

PyObject* isas(PyObject*, PyObject*) {
  const auto usable = jmm_fast::usable_isas();
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(usable.size()));
  for (size_t i = 0; tuple != nullptr && i < usable.size(); ++i) {
    PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), text(jmm_fast::isa_name(usable[i])));
  }
  return tuple;
}

PyObject* isa(PyObject*, PyObject*) {
  try {
    return text(jmm_fast::isa_name(jmm_fast::active_isa()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* set_isa(PyObject*, PyObject* name) {
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(name, &size);
  if (data == nullptr) return nullptr;
  try {
    jmm_fast::set_isa({data, static_cast<size_t>(size)});
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "Instruction sets this build has and this processor runs, in rising order."},
    {"isa", isa, METH_NOARGS, "The instruction set in use: the best one, or JMM_FAST_ISA."},
    {"set_isa", set_isa, METH_O, "Use the instruction set of this name from now on, in the whole process."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "CPU kernels of jmm_fast; importing the module registers them with torch.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&definition); }
