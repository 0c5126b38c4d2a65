// jmm_fast._cuda: importing it registers the CUDA kernels with torch. Within Python's limited API, as jmm_fast._C.

#include <Python.h>

#include "motion_mask/cuda_kernel.h"
#include "topology_attention/cuda_kernel.h"

namespace {

PyObject* load_error(PyObject*, PyObject*) {
  const char* error = jmm_fast::motion_mask::cuda::load_error();
  if (error == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(error);
}

PyObject* attention_tokens(PyObject*, PyObject* arguments) {
  int memory, width, joints;
  if (!PyArg_ParseTuple(arguments, "iii:attention_tokens", &memory, &width, &joints)) return nullptr;
  return PyLong_FromLong(jmm_fast::topology_attention::cuda::most_tokens(memory, width, joints));
}

PyMethodDef methods[] = {
    {"load_error", load_error, METH_NOARGS, "None when the kernels run on the current GPU, else CUDA's reason."},
    {"attention_tokens", attention_tokens, METH_VARARGS,
     "attention_tokens(memory, width, joints): most tokens of which a block of topology attention takes at most so "
     "many "
     "bytes of shared memory."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cuda",
                          "CUDA kernels of jmm_fast; importing the module registers them with torch.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda(void) { return PyModule_Create(&definition); }
